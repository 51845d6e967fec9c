"""Check the files of infra/ with the schemas of Kubernetes and KubeRay, our command line and our pinned versions.

No cluster is needed. docs/kubernetes.md lists what these tests cannot check.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.common_options import Common
from jobs.encode_options import EncodeOptions
from jobs.options import DecodeOptions, StatusOptions
from jobs.parsing import parse

kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
NIGHTLY = INFRA / "kubernetes/nightly.sh"
KUBERNETES = "1.37.0"  # the newest schema that kubernetes-validate contains
OPTIONS: dict[str, Any] = {"encode": EncodeOptions, "decode": DecodeOptions, "status": StatusOptions}

# Fields of KubeRay 1.7 (rayjob_types.go, raycluster_types.go). The API server drops all others without an error.
RAY_JOB = {
    "entrypoint", "backoffLimit", "submitterConfig", "activeDeadlineSeconds", "preRunningDeadlineSeconds",
    "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec", "submissionMode", "submitterPodTemplate",
    "runtimeEnvYAML", "jobId", "metadata", "clusterSelector", "managedBy", "deletionStrategy", "suspend",
    "entrypointNumCpus", "entrypointNumGpus", "entrypointResources",
}  # fmt: skip
RAY_CLUSTER = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
    "headServiceAnnotations", "gcsFaultToleranceOptions", "managedBy", "suspend", "upgradeStrategy",
}  # fmt: skip
HEAD_GROUP = {"rayStartParams", "template", "serviceType", "headService", "enableIngress", "resources", "labels"}
WORKER_GROUP = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "rayStartParams", "template",
    "scaleStrategy", "numOfHosts", "suspend", "resources", "labels",
}  # fmt: skip
AUTOSCALER = {
    "version", "idleTimeoutSeconds", "upscalingMode", "securityContext", "resources", "image", "imagePullPolicy", "env",
    "envFrom", "volumeMounts",
}  # fmt: skip


def load(name: str) -> list[Any]:
    return list(yaml.safe_load_all((INFRA / name).read_text(encoding="utf-8")))


RAYJOBS = {name: load(f"kubernetes/{name}.yaml")[0] for name in ("encode", "encode-tpu", "decode")}
COMPOSE = load("compose.yaml")[0]
rayjobs = pytest.mark.parametrize("spec", [job["spec"] for job in RAYJOBS.values()], ids=list(RAYJOBS))


def list_pods(spec: Any) -> list[Any]:
    """Return the pod templates of a RayJob: that of the head and those of the workers."""
    cluster = spec["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def find_commands() -> Iterator[str]:
    """Yield every latentmill command in a file of infra/ or in docs/kubernetes.md."""
    yield from (job["spec"]["entrypoint"] for job in RAYJOBS.values())
    files = [*INFRA.rglob("*.yaml"), INFRA / "Containerfile", ROOT / "docs/kubernetes.md"]
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := re.search(r"\blatentmill (encode|decode|status) (s3:/)?/.*", line):
                yield match[0]


def parse_command(command: str) -> Any:
    program, verb, *arguments = shlex.split(command, comments=True)
    assert program == "latentmill"
    return parse(OPTIONS[verb], verb, arguments)[0]


def parse_mebibytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 1, "Gi": 1024}[unit]


@pytest.mark.parametrize("path", sorted(INFRA.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_manifest_is_valid_yaml(path: Path) -> None:
    assert all(isinstance(part, dict) for part in load(str(path.relative_to(INFRA))))


@pytest.mark.parametrize("part", load("kubernetes/nightly.yaml"), ids=lambda part: str(part["kind"]))
def test_the_schedule_is_valid(part: Any) -> None:
    kubernetes_validate.validate(part, KUBERNETES, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_output_of_kustomize_is_valid_and_contains_the_job() -> None:
    command = ["kubectl", "kustomize", str(INFRA / "kubernetes")]
    manifests = list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    for part in manifests:
        kubernetes_validate.validate(part, KUBERNETES, strict=True)
        assert part["metadata"]["namespace"] == "latentmill"
    by_kind = {part["kind"]: part for part in manifests}
    assert yaml.safe_load(by_kind["ConfigMap"]["data"]["encode.yaml"]) == RAYJOBS["encode"]
    volumes = by_kind["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"]
    assert volumes[0]["configMap"]["name"] == by_kind["ConfigMap"]["metadata"]["name"]


@rayjobs
def test_a_rayjob_has_only_fields_of_kuberay(spec: Any) -> None:
    cluster = spec["rayClusterSpec"]
    assert set(spec) <= RAY_JOB
    assert set(cluster) <= RAY_CLUSTER
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP
    assert set(cluster.get("autoscalerOptions", {})) <= AUTOSCALER
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP
    for params in (group["rayStartParams"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])):
        assert all(isinstance(value, str) for value in params.values())  # the API server refuses numbers


@rayjobs
def test_the_pods_of_a_rayjob_are_valid(spec: Any) -> None:
    for pod in list_pods(spec):
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **pod}
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@rayjobs
def test_no_pod_runs_as_root_or_can_gain_privileges(spec: Any) -> None:
    schedule = load("kubernetes/nightly.yaml")[0]["spec"]["jobTemplate"]["spec"]["template"]
    for pod in (*list_pods(spec), schedule):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@rayjobs
def test_every_pod_gets_the_credentials_of_the_store_from_a_secret(spec: Any) -> None:
    for pod in list_pods(spec):
        for container in pod["spec"]["containers"]:
            assert container["envFrom"] == [{"secretRef": {"name": "latentmill-s3"}}]


def test_no_file_contains_a_secret() -> None:
    for path in (path for path in [*INFRA.rglob("*"), ROOT / "docs/kubernetes.md"] if path.is_file()):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bA(KI|SI)A[A-Z0-9]{12}|kind: Secret|BEGIN [A-Z ]*PRIVATE KEY", text), path
        assignments = re.findall(r"\b(AWS_ACCESS_KEY_ID|AWS_SECRET_ACCESS_KEY)\b *[:=] *(\S+)", text)
        assert {value for _, value in assignments} <= {"demo", "..."}, path


@pytest.mark.parametrize("command", sorted(set(find_commands()) - {""}))
def test_every_command_is_accepted_by_the_command_line(command: str) -> None:
    assert isinstance(parse_command(command), Common | StatusOptions)


def test_the_files_contain_commands_of_every_kind() -> None:
    assert {shlex.split(command)[1] for command in find_commands()} == {"encode", "decode", "status"}


@rayjobs
def test_a_worker_fits_into_a_pod_and_the_cluster_scales_with_the_workers(spec: Any) -> None:
    options, (group,) = parse_command(spec["entrypoint"]), spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    chips = int(limits.get("google.com/tpu", 0))
    if chips:
        assert (options.backend, options.device, group["numOfHosts"]) == ("jax", "tpu", 1)
        selector = group["template"]["spec"]["nodeSelector"]
        assert math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))) == chips
        assert options.cpus_per_worker * chips <= int(limits["cpu"])
    else:
        assert options.device == "cuda"
        assert options.cpus_per_worker <= int(limits["cpu"])
        assert options.gpus_per_worker <= int(limits["nvidia.com/gpu"])
    assert options.workers == "auto"  # the number of workers follows the autoscaler
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@rayjobs
def test_gpus_may_be_added_later_and_the_head_has_no_worker(spec: Any) -> None:
    starts_without_gpus = any(group["minReplicas"] == 0 for group in spec["rayClusterSpec"]["workerGroupSpecs"])
    assert spec["rayClusterSpec"].get("enableInTreeAutoscaling", False) or not starts_without_gpus
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@rayjobs
def test_the_object_store_fits_into_the_memory_of_its_pod(spec: Any) -> None:
    cluster = spec["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        assert shm["medium"] == "Memory"
        assert int(group["rayStartParams"]["object-store-memory"]) < parse_mebibytes(shm["sizeLimit"]) << 20
        assert parse_mebibytes(shm["sizeLimit"]) < parse_mebibytes(
            pod["containers"][0]["resources"]["limits"]["memory"]
        )


@rayjobs
def test_the_image_and_the_manifests_have_the_pinned_version_of_ray(spec: Any) -> None:
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    (base,) = re.findall(r"^FROM rayproject/ray:([\d.]+)-", (INFRA / "Containerfile").read_text("utf-8"), re.MULTILINE)
    assert (base, spec["rayClusterSpec"]["rayVersion"]) == (pinned, pinned)
    assert len({container["image"] for pod in list_pods(spec) for container in pod["spec"]["containers"]}) == 1


def test_the_image_copies_only_files_that_exist_and_are_not_ignored() -> None:
    lines = (INFRA / "Containerfile").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[2:-1]]
    ignore_rules = (INFRA / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {"latentmill", "vae", "pipeline", "jobs", "pyproject.toml", "constraints.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignore_rules, name


def test_every_install_in_the_image_is_pinned() -> None:
    text = (INFRA / "Containerfile").read_text(encoding="utf-8")
    installs = re.findall(r"pip install.*", text)
    assert installs and all("--constraint constraints.txt" in line for line in installs)
    assert "[dev]" not in text and "index-url" not in text
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(INFRA.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_image_has_a_version(path: Path) -> None:
    for image in re.findall(r"^ *image: (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        assert re.search(r":(?!latest$)[\w.-]+$", image), image


def test_the_local_store_is_reachable_from_this_machine_only() -> None:
    services = COMPOSE["services"]
    assert services["store"]["ports"] == ["127.0.0.1:8333:8333"]
    assert all("ports" not in service for name, service in services.items() if name != "store")
    assert services["encode"]["environment"] == services["store"]["environment"]  # the same key for client and server
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (INFRA / source).is_dir(), source


def test_the_schedule_has_rights_only_to_its_own_job() -> None:
    name = RAYJOBS["encode"]["metadata"]["name"]
    (role,) = [part for part in load("kubernetes/nightly.yaml") if part["kind"] == "Role"]
    for rule in role["rules"]:
        assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
        assert rule["verbs"] == ["create"] or rule["resourceNames"] == [name]
    assert f"rayjob=rayjob/{name}\n" in NIGHTLY.read_text(encoding="utf-8")


FAKE_KUBECTL = """#!/bin/sh
# `get` prints the next line of the file `states`, or fails if that is FAIL; other verbs are written to `verbs`
if [ "$1" != get ]; then echo "$1" >> verbs; exit; fi
state=$(head -n 1 states); sed -i 1d states
[ "$state" != FAIL ] || exit 1
echo "$state"
"""


@pytest.mark.parametrize(
    ("states", "verbs", "code"),
    [
        (["", "is  ", "is Running RUNNING", "is Complete SUCCEEDED"], ["create"], 0),
        (["is Complete SUCCEEDED", "is Running RUNNING", "is Complete SUCCEEDED"], ["delete", "create"], 0),
        (["is Failed FAILED", "is Complete SUCCEEDED"], ["delete", "create"], 0),
        (["is Running RUNNING", "is Complete SUCCEEDED"], [], 0),  # waits for a RayJob that is still running
        (["", "FAIL", "is Retrying FAILED", "is Complete SUCCEEDED"], ["create"], 0),
        (["", "is Failed FAILED", "AppFailed: why"], ["create"], 1),
        (["", "is Complete STOPPED", ": why"], ["create"], 1),
        (["", "is ValidationFailed ", ": why"], ["create"], 1),
        (["", "is Running RUNNING", ""], ["create"], 1),  # the RayJob was deleted
        (["FAIL"], [], 1),
    ],
)
def test_the_exit_code_of_the_nightly_script_is_that_of_its_job(
    tmp_path: Path, states: list[str], verbs: list[str], code: int
) -> None:
    for name, text in {"kubectl": FAKE_KUBECTL, "sleep": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    (tmp_path / "verbs").touch()
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        ["sh", str(NIGHTLY), "encode.yaml"], cwd=tmp_path, env={"PATH": path}, capture_output=True, timeout=30
    )
    assert process.returncode == code, process.stderr
    assert (tmp_path / "verbs").read_text().split() == verbs
    assert (tmp_path / "states").read_text() == ""  # the script read the state exactly as often as expected
