"""Connections made within a network namespace, as containerd's port-forward and host-side probes use a pod's."""

import ctypes
import json
import socket
import threading

from .crictl import words

CLONE_NEWNET = 0x40000000


def of(pod):
    """The path of a pod's network namespace on the host."""
    spec = json.loads(words("inspectp", pod.id))["info"]["runtimeSpec"]
    return next(n["path"] for n in spec["linux"]["namespaces"] if n["type"] == "network")


def connect(path, address, port, timeout=20):
    """A TCP connection made in the namespace; it stays there, wherever it is used."""
    result = []

    def work():
        try:
            with open(path) as netns:
                if ctypes.CDLL(None, use_errno=True).setns(netns.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns {path}")
            result.append(socket.create_connection((address, port), timeout=timeout))
        except OSError as error:
            result.append(error)

    # A thread of its own, that ends in the namespace.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


def ask(connection, request=b""):
    """Sends a request, ends this side, and returns all of the answer."""
    with connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


def get(connection, path="/"):
    """The body of a page."""
    answer = ask(connection, f"GET {path} HTTP/1.0\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 200 " in head, answer[:200]
    return body.decode().rstrip("\n")
