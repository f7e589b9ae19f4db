"""Everything works with no network at all, and with one nothing tries to use it.

The product runs in a network namespace of its own. There either only loopback exists, or also a tunnel to nowhere with the
default route and the name server behind it: whatever a library sends out is read from the tunnel, by destination.
"""

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest
from served_ui import environment, graphql, served, stale, tracked
from toy_project import TARGETS, copied, replace_reference

NAMESPACE = ["unshare", "--map-root-user", "--net", "--mount"]
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
NAMES = "192.0.2.53"  # a name server in a network kept for documentation (RFC 5737)


def open_tunnel() -> int:
    """A tunnel with the default routes and, by ``/etc/resolv.conf``, the name server behind it; returns its descriptor."""
    tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tunnel, TUNSETIFF, struct.pack("16sH", b"canary", IFF_TUN | IFF_NO_PI))
    for command in ("link set canary addrgenmode none", "link set canary up", "address add 192.0.2.1/24 dev canary", "route add default dev canary",
                    "-6 address add 2001:db8::1/64 dev canary nodad", "-6 route add default dev canary"):
        subprocess.run(["ip", *command.split()], check=True)
    Path("resolv.conf").write_text(f"nameserver {NAMES}\n")
    subprocess.run(["mount", "--bind", "resolv.conf", "/etc/resolv.conf"], check=True)
    return tunnel


def sent_to(tunnel: int) -> list[str]:
    """Destinations of the packets sent since the last call, but for the kernel's own multicast."""
    found = []
    try:
        while packet := os.read(tunnel, 65536):
            destination = ip_address(packet[16:20] if packet[0] >> 4 == 4 else packet[24:40])
            if not destination.is_multicast:
                found.append(str(destination))
    except BlockingIOError:
        return found
    return found


def everything(project: Path) -> None:
    """Demo, DVC, Dagster and both pages, as a user runs them."""
    def python(root: Path, *arguments: str) -> None:
        done = subprocess.run([sys.executable, *arguments], cwd=root, env=environment(root), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    python(Path.cwd(), "-m", "pipelines.cli", "demo", "--out", "demo", "--quiet", "profile=smoke")
    replace_reference(project, TARGETS[0])
    python(project, "-m", "dvc", "repro", "--quiet")
    python(project, "-m", "pipelines.cli", "sync")
    replace_reference(project, TARGETS[1])
    python(project, "-m", "pipelines.cli", "materialize")
    with served(project) as ui:
        assert stale(ui) == set()
        assert len(graphql(ui, "{ assetNodes { id } }")["assetNodes"]) > 10
        assert len(tracked(ui)) > 10


def inside(project: Path, tunnelled: bool) -> None:
    """What runs in the namespace; prints what was sent out by the product, and by a look-up and a connection of our own."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    tunnel = open_tunnel() if tunnelled else None
    everything(project)
    if tunnel is not None:
        sent = sent_to(tunnel)
        subprocess.run([sys.executable, "-c", "import socket; socket.getaddrinfo('example.org', 443)"], stderr=subprocess.DEVNULL, check=False)
        with socket.socket() as probe:
            probe.setblocking(False)
            probe.connect_ex(("198.51.100.7", 443))
        print(json.dumps({"sent": sent, "control": sent_to(tunnel)}))


@pytest.mark.nightly
@pytest.mark.parametrize("tunnelled", [False, True], ids=["no network", "a watched network"])
def test_nothing_needs_or_uses_the_network(built_toy: Path, tmp_path: Path, tunnelled: bool) -> None:
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("needs unshare and ip (Debian: apt-get install util-linux iproute2)")
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no network namespaces")
    if tunnelled and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/net/tun")
    root = copied(built_toy, tmp_path)
    code = f"from pathlib import Path; from test_network import inside; inside(Path({str(root)!r}), {tunnelled})"
    done = subprocess.run([*NAMESPACE, sys.executable, "-c", code], cwd=tmp_path, env=environment(Path(__file__).parent), capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    if tunnelled:
        seen = json.loads(done.stdout.splitlines()[-1])
        assert {NAMES, "198.51.100.7"} <= set(seen["control"]), "the tunnel sees what is sent"
        assert seen["sent"] == []
