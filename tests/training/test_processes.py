"""What the tests of several ranks stand on."""

from __future__ import annotations

import socket

import pytest
from training.processes import free_port


def test_a_port_is_kept_for_the_server_that_names_it() -> None:
    ports = [free_port() for _ in range(20)]
    assert len(set(ports)) == 20
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", ports[0]))
    with socket.create_server(("127.0.0.1", ports[0])):
        pass
