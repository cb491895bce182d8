"""Lists of addresses: fixed, in a file, behind a DNS name; and what is refused."""

import asyncio
import pickle
import traceback

import pytest

from tessy_hf.engines.addresses import Addresses
from tessy_hf.errors import SettingsError

SECRET = "sk-planted-0123456789abcdef"


def test_a_file_is_read_with_comments_and_repetitions(tmp_path):
    path = tmp_path / "servers.txt"
    path.write_text("# teachers\nhttp://one:8000/v1  # the first\n\n  http://two:8000/v1/\nhttp://one:8000/v1\n")
    given = Addresses(f"file://{path}")
    assert given.dynamic and asyncio.run(given.read()) == ["http://one:8000/v1", "http://two:8000/v1"]
    assert asyncio.run(pickle.loads(pickle.dumps(given)).read()) == asyncio.run(given.read())
    assert repr(given) == f"'file://{path}'"


def test_a_name_resolves_to_all_its_addresses():
    read = asyncio.run(Addresses("dns+http://localhost:8000/v1/").read())
    assert "http://127.0.0.1:8000/v1" in read
    assert set(read) <= {"http://127.0.0.1:8000/v1", "http://[::1]:8000/v1"}
    with pytest.raises(OSError):
        asyncio.run(Addresses("dns+http://nobody.invalid/v1").read())


@pytest.mark.parametrize(
    "address", ["file://servers.txt", "file://", "dns+http://", "dns+https://host/v1", "dns+http://me:sk-1@host/v1"]
)
def test_files_and_names_that_cannot_be_used_are_refused(address):
    with pytest.raises(SettingsError, match="expected") as caught:
        Addresses(address)
    assert "sk-1" not in str(caught.value)


def test_a_fixed_list_stays():
    given = Addresses(["http://one/v1/", "https://two:8/v1", "http://one/v1"])
    assert not given.dynamic and asyncio.run(given.read()) == given.fixed == ["http://one/v1", "https://two:8/v1"]
    assert repr(given) == "['http://one/v1', 'https://two:8/v1']"


@pytest.mark.parametrize(
    "address",
    [
        f"http://me:{SECRET}@127.0.0.1:8000/v1",
        f"me:{SECRET}@127.0.0.1:8000/v1",
        f"http://127.0.0.1:8000/v1?api_key={SECRET}",
        f"http://127.0.0.1:8000/v1#{SECRET}",
    ],
)
def test_an_address_that_contains_a_secret_is_refused_without_showing_it(address):
    with pytest.raises(SettingsError, match="environment variable") as caught:
        Addresses(address)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1",
                "http://host:99999/v1", "http://ho st/v1", "http://host/v1\n", "file:///etc/passwd", None]
)  # fmt: skip
def test_an_address_that_cannot_be_used_is_refused(address):
    with pytest.raises(SettingsError, match="base_url=.*is expected"):
        Addresses([address])


def test_no_address_is_refused():
    with pytest.raises(SettingsError, match="got no address"):
        Addresses([])
