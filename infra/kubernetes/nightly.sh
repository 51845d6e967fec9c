#!/bin/sh
# Creates the RayJob of the manifest $1 and waits for its end. The exit code is 0 only if the job succeeded.
#
# The name of the RayJob is a lock, because only one RayJob of a name can exist. If it is still running (its waiting pod
# was evicted, or somebody started it by hand), this script waits for it. If it has ended, this script deletes it and
# creates a new one; a finished RayJob stays until then, so that it can be inspected.
set -eu

rayjob=rayjob/latentmill-encode

# Prints the state, such as "is Running RUNNING", or nothing if there is no such RayJob.
print_state() {
    kubectl get "$rayjob" --ignore-not-found --output jsonpath='is {.status.jobDeploymentStatus} {.status.jobStatus}'
}

state=$(print_state)
case "$state" in
"is Complete "* | "is Failed "* | "is ValidationFailed "*)
    kubectl delete "$rayjob"
    state=
    ;;
esac
if [ -z "$state" ]; then
    kubectl create --filename "$1"
fi

while sleep 30; do
    state=$(print_state) || continue # the API server may be unavailable for a moment
    case "$state" in
    "is Complete SUCCEEDED")
        exit 0
        ;;
    "is Complete "* | "is Failed "* | "is ValidationFailed "*) # a stopped job is Complete too
        echo "$rayjob $state"
        kubectl get "$rayjob" --output jsonpath='{.status.reason}: {.status.message}{"\n"}'
        exit 1
        ;;
    "")
        echo "$rayjob was deleted"
        exit 1
        ;;
    esac
done
