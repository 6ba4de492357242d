"""Exit 0 when the package index (or the proxy before it) takes a connection. Called by setup.sh after a failure; needs no packages."""
import os
import socket
import sys
from urllib.parse import urlsplit
from urllib.request import getproxies

named = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
index = next((os.environ[k] for k in named if os.environ.get(k)), "https://pypi.org/simple")
url = urlsplit(getproxies().get("https") or index)
if url.scheme == "file":
    sys.exit(not os.path.exists(url.path))
try:
    port = url.port or (80 if url.scheme == "http" else 443)
    socket.create_connection((url.hostname, port), timeout=10).close()
except OSError as e:
    sys.exit(f"{url.hostname}: {e}")
