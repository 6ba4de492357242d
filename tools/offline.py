"""Run a command without network, to prove that it needs none:   python tools/offline.py make test

Linux only (util-linux's `unshare`): a network of its own in which only this machine's own address, 127.0.0.1, works, because
Jupyter talks to its kernels over it. Where that is not possible the command runs with the network, and a line says so.
"""
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys

UP = 1                     # IFF_UP
GET, SET = 0x8913, 0x8914  # SIOCGIFFLAGS, SIOCSIFFLAGS
UNSHARE = ["unshare", "--map-root-user", "--net"]


def loopback_up():
    "What `ip link set lo up` does; `ip` is not on every machine."
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        name, flags = struct.unpack("16sh", fcntl.ioctl(s, GET, struct.pack("16sh", b"lo", 0)))
        fcntl.ioctl(s, SET, struct.pack("16sh", name, flags | UP))


def main():
    inside, command = sys.argv[1] == "--inside", sys.argv[1:]
    if inside:
        loopback_up()
        command = command[1:]
        links = [name for _, name in socket.if_nameindex()]
        print(f"Without network (links: {', '.join(links)}): {' '.join(command)}", flush=True)
    elif shutil.which("unshare") and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0:
        command = [*UNSHARE, sys.executable, __file__, "--inside", *command]
    else:
        print(f"The network cannot be cut off here; with network: {' '.join(command)}", flush=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
