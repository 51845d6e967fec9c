"""A real S3 gateway on loopback: Ceph, with a monitor, a store in memory and a radosgw.

LATENTMILL_TEST_S3=ceph uses it. On Debian, install it with
apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common
"""

import json
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon max pg per osd = 1000
mon allow pool size one = true
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/rgw
"""

CAPABILITIES = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "client.rgw": {"mon": "allow rwx", "osd": "allow rwx"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
}


@contextmanager
def gateway(folder: Path, port: int, mon_port: int, key: str, secret: str) -> Iterator[str]:
    """Run a gateway with one account, and return its URL.

    folder: an empty folder with a short path, because Ceph's sockets are in it.
    """
    conf, keyring = folder / "ceph.conf", folder / "keyring"
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    conf.write_text(CONFIGURATION.format(folder=folder, fsid=fsid, port=port, mon_port=mon_port))
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()

    def run(program: str, *argv: object, timeout: float = 60) -> str:
        command = [program, "-c", str(conf), *map(str, argv)]
        return subprocess.run(command, check=True, timeout=timeout, capture_output=True, text=True).stdout

    for number, (name, rights) in enumerate(CAPABILITIES.items()):
        caps = [word for right in rights.items() for word in ("--cap", *right)]
        create = () if number else ("--create-keyring",)
        subprocess.run(
            ["ceph-authtool", *create, str(keyring), "--gen-key", "-n", name, *caps], check=True, capture_output=True
        )
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", folder / "monmap")
    run("ceph-mon", "-i", "a", "--mkfs", "--monmap", folder / "monmap", "--keyring", keyring)
    with ExitStack() as daemons:

        def start(*command: object) -> None:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = daemons.enter_context(subprocess.Popen([*map(str, command)], **quiet))
            daemons.callback(process.kill)

        start("ceph-mon", "-c", conf, "-f", "-i", "a")
        wait_until(lambda: json.loads(run("ceph", "--connect-timeout", 2, "quorum_status"))["quorum"] == [0])
        run("ceph", "osd", "new", osd)
        run("ceph-osd", "-i", 0, "--mkfs", "--osd-uuid", osd)
        run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=here", "root=default")
        start("ceph-osd", "-c", conf, "-f", "-i", 0)
        wait_until(lambda: json.loads(run("ceph", "osd", "stat", "-f", "json"))["num_up_osds"] == 1)
        start("radosgw", "-c", conf, "-f", "-n", "client.rgw", "--no-mon-config")
        admin = ("radosgw-admin", "-n", "client.admin", "--no-mon-config")
        account = ("--uid=tests", "--display-name=tests", f"--access-key={key}", f"--secret-key={secret}")
        wait_until(lambda: run(*admin, "user", "create", *account))
        wait_until(lambda: is_listening(port))
        yield f"http://127.0.0.1:{port}"


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Return when the condition is true. Until then, its command may fail."""
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (subprocess.SubprocessError, ValueError):
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end
        time.sleep(0.3)
