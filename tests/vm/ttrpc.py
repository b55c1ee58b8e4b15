"""A client of ttrpc, and protobuf's wire format as far as the tests need it."""

import struct


class Client:
    """Calls one at a time over a connected socket."""

    def __init__(self, socket, service):
        self.socket, self.service, self.stream = socket, service, -1

    def call(self, method, payload=b"", limit=20):
        """The status code (0: fine) and the response's bytes, or the status' message."""
        request = field(1, self.service.encode()) + field(2, method.encode()) + (field(3, payload) if payload else b"")
        # ttrpc: length, stream id (odd for a client), type 1 request, flags; all big-endian.
        self.stream += 2
        self.socket.settimeout(limit)
        self.socket.sendall(struct.pack(">IIBB", len(request), self.stream, 1, 0) + request)
        length, stream, kind, _ = struct.unpack(">IIBB", receive(self.socket, 10))
        assert (stream, kind) == (self.stream, 2), (stream, kind)
        response = dict(fields(receive(self.socket, length)))
        status = dict(fields(response.get(1, b"")))
        code = status.get(1, 0)
        return code, status.get(2, b"") if code else response.get(2, b"")


def receive(socket, length):
    """So many bytes."""
    data = b""
    while len(data) < length:
        piece = socket.recv(length - len(data))
        if not piece:
            raise EOFError(f"the connection ended after {len(data)} of {length} bytes")
        data += piece
    return data


def varint(value):
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])


def number(field, value):
    """A field that is a number."""
    return varint(field << 3) + varint(value)


def field(number, data):
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def fields(data):
    """Numbers and values of varint and length-delimited fields."""
    at = 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
        else:
            length = number()
            yield key >> 3, data[at : at + length]
            at += length
