#!/bin/sh
# Makes the RayJob of the manifest $1, waits for its end, and ends with 0 only where the job succeeded.
#
# The RayJob's name is the lock: there is one of that name, whoever made it. One that still runs (its waiting pod was
# evicted, or somebody started it by hand) is waited for; one that has ended made room for this, and until then stood
# there to be looked at.
set -eu

rayjob=rayjob/latentmill-encode

# "is Running RUNNING", say; nothing where there is no such RayJob.
state() {
    kubectl get "$rayjob" --ignore-not-found --output jsonpath='is {.status.jobDeploymentStatus} {.status.jobStatus}'
}

found=$(state)
case "$found" in
"is Complete "* | "is Failed "* | "is ValidationFailed "*)
    kubectl delete "$rayjob"
    found=
    ;;
esac
if [ -z "$found" ]; then
    kubectl create --filename "$1"
fi

while sleep 30; do
    now=$(state) || continue # the API server may be away for a moment
    case "$now" in
    "is Complete SUCCEEDED")
        exit 0
        ;;
    "is Complete "* | "is Failed "* | "is ValidationFailed "*) # a job that was stopped is Complete, too
        echo "$rayjob $now"
        kubectl get "$rayjob" --output jsonpath='{.status.reason}: {.status.message}{"\n"}'
        exit 1
        ;;
    "")
        echo "$rayjob was deleted"
        exit 1
        ;;
    esac
done
