"""`BlobLocation`: the URLs that users write, and no message with their secrets."""

from __future__ import annotations

import pickle
from pathlib import Path, PurePath, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azure_torch_ckpt.errors import LocationError
from azure_torch_ckpt.location import BlobLocation

SAS = "sv=2025-01-05&se=2026-12-31T00%3A00%3A00Z&sr=c&sp=rcwdl&sig=S3cr3tSignature%2Bab%2Fcd%3D"
SNAPSHOT = "2026-01-31T12:00:00.1234567Z"
CONTAINER_URL = "https://acct.blob.core.windows.net/ckpt"


@pytest.mark.parametrize(
    ("url", "endpoint", "account", "rest"),
    [
        ("https://acct.blob.core.windows.net/ckpt", "acct.blob.core.windows.net", "acct", "ckpt/"),
        ("https://acct.blob.core.windows.net/ckpt/", "acct.blob.core.windows.net", "acct", "ckpt/"),
        ("https://acct.blob.core.windows.net/ckpt/a/b/", "acct.blob.core.windows.net", "acct", "ckpt/a/b"),
        ("HTTPS://Acct.Blob.Core.Windows.Net/ckpt/A", "acct.blob.core.windows.net", "acct", "ckpt/A"),
        ("https://acct.blob.core.windows.net:443/ckpt", "acct.blob.core.windows.net", "acct", "ckpt/"),
        ("https://acct.blob.core.windows.net/$root/a", "acct.blob.core.windows.net", "acct", "$root/a"),
        ("https://acct.blob.core.windows.net/%24web/a", "acct.blob.core.windows.net", "acct", "$web/a"),
        ("https://acc.blob.core.chinacloudapi.cn/c-1/a", "acc.blob.core.chinacloudapi.cn", "acc", "c-1/a"),
        ("https://acc.blob.core.usgovcloudapi.net/c-1", "acc.blob.core.usgovcloudapi.net", "acc", "c-1/"),
        ("https://acct.blob.core.cloudapi.de/ckpt/a", "acct.blob.core.cloudapi.de", "acct", "ckpt/a"),
        ("https://acct.z01.blob.storage.azure.net/ckpt", "acct.z01.blob.storage.azure.net", "acct", "ckpt/"),
        ("https://acct.dfs.core.windows.net/ckpt/a", "acct.blob.core.windows.net", "acct", "ckpt/a"),
        ("https://acct.z01.dfs.storage.azure.net/ckpt", "acct.z01.blob.storage.azure.net", "acct", "ckpt/"),
        (
            "https://acct.privatelink.dfs.core.windows.net/ckpt",
            "acct.privatelink.blob.core.windows.net",
            "acct",
            "ckpt/",
        ),
        (
            "https://acct-secondary.blob.core.windows.net/ckpt/a",
            "acct-secondary.blob.core.windows.net",
            "acct",
            "ckpt/a",
        ),
        ("https://my-data.example.org/ckpt/a", "my-data.example.org", "my-data", "ckpt/a"),
        ("https://my.host:8443/ckpt/a", "my.host:8443", "my", "ckpt/a"),
        ("http://my.host/ckpt/a", "my.host", "my", "ckpt/a"),
        (
            "http://127.0.0.1:10000/devstoreaccount1/ckpt/a",
            "127.0.0.1:10000/devstoreaccount1",
            "devstoreaccount1",
            "ckpt/a",
        ),
        ("http://localhost:80/account2/ckpt", "localhost/account2", "account2", "ckpt/"),
        ("http://azurite:10000/acct/ckpt/a/b", "azurite:10000/acct", "acct", "ckpt/a/b"),
        ("http://azurite:10000/acct-secondary/ckpt", "azurite:10000/acct-secondary", "acct", "ckpt/"),
        ("https://[::1]:10000/acct/ckpt/a", "[::1]:10000/acct", "acct", "ckpt/a"),
        ("http://host.docker.internal:10000/acct/ckpt/a", "host.docker.internal:10000/acct", "acct", "ckpt/a"),
        ("azblob://acct/ckpt/a/b", "acct.blob.core.windows.net", "acct", "ckpt/a/b"),
        ("azblob://acct/ckpt", "acct.blob.core.windows.net", "acct", "ckpt/"),
        ("azblob://acct.blob.core.chinacloudapi.cn/ckpt/a", "acct.blob.core.chinacloudapi.cn", "acct", "ckpt/a"),
        ("azblob://acct.dfs.core.windows.net/ckpt/a", "acct.blob.core.windows.net", "acct", "ckpt/a"),
        ("https:/acct.blob.core.windows.net/ckpt/a", "acct.blob.core.windows.net", "acct", "ckpt/a"),
        ("azblob:/acct/ckpt/a", "acct.blob.core.windows.net", "acct", "ckpt/a"),
    ],
)
def test_what_is_understood(url: str, endpoint: str, account: str, rest: str) -> None:
    """`endpoint` without its scheme, and `rest`: container and path."""
    location = BlobLocation.parse(url)
    endpoint = f"{'http' if url.startswith('http:') else 'https'}://{endpoint}"
    container, _, path = rest.partition("/")
    assert location == BlobLocation(endpoint, account, container, path)
    assert BlobLocation.parse(str(location)) == location
    assert BlobLocation.parse(f"{url}?{SAS}") == BlobLocation(endpoint, account, container, path, SAS)


@pytest.mark.parametrize(
    "path",
    [
        Path("https://acct.blob.core.windows.net/ckpt/a b"),
        PureWindowsPath("https://acct.blob.core.windows.net/ckpt/a b"),
        Path("azblob://acct/ckpt/a b"),
    ],
    ids=["posix", "windows", "azblob"],
)
def test_a_path_object_made_of_a_url_is_repaired(path: PurePath) -> None:
    assert str(BlobLocation.parse(path)) == "https://acct.blob.core.windows.net/ckpt/a%20b"


def test_a_path_object_keeps_the_sas() -> None:
    assert BlobLocation.parse(Path(f"{CONTAINER_URL}/a?{SAS}")).sas == SAS


def test_a_location_is_taken_as_it_is() -> None:
    location = BlobLocation.parse(f"{CONTAINER_URL}/a?{SAS}")
    assert BlobLocation.parse(location) is location


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://acct.blob.core.windows.net", "no container"),
        ("https://acct.blob.core.windows.net/", "no container"),
        ("http://127.0.0.1:10000/devstoreaccount1", "no container"),
        ("http://127.0.0.1:10000/devstoreaccount1/", "http://127.0.0.1:10000/ACCOUNT/CONTAINER"),
        ("http://127.0.0.1:10000", "starts with the account"),
        ("http://127.0.0.1:10000/My_Account/ckpt", "starts with the account"),
        ("https://acct.blob.core.windows.net/Ckpt/a", "Invalid container name ('Ckpt')"),
        ("https://acct.blob.core.windows.net/ab/a", "Invalid container name ('ab')"),
        (f"https://acct.blob.core.windows.net/{'a' * 64}/a", "Invalid container name"),
        ("https://acct.blob.core.windows.net/a--b/a", "Invalid container name"),
        ("https://acct.blob.core.windows.net/-ab/a", "Invalid container name"),
        ("https://acct.blob.core.windows.net/ab-/a", "Invalid container name"),
        ("https://acct.blob.core.windows.net/a_b/a", "Invalid container name"),
        ("https://acct.blob.core.windows.net/$other/a", "Invalid container name"),
        ("https://acct.blob.core.windows.net/ck\u0665pt/a", "Invalid container name"),
        ("https://acct.blob.core.windows.net//ckpt/a", "no container"),
        (f"{CONTAINER_URL}/{'a' * 1025}", "1,024 characters"),
        (f"{CONTAINER_URL}/{'a/' * 254}a", "254 segments"),
        (f"{CONTAINER_URL}/a/./b", "'.' or '..'"),
        (f"{CONTAINER_URL}/a/../b", "'.' or '..'"),
        (f"{CONTAINER_URL}/a/%2e%2E/b", "'.' or '..'"),
        (f"{CONTAINER_URL}/..", "'.' or '..'"),
        (f"{CONTAINER_URL}/a//b", "empty segment"),
        (f"{CONTAINER_URL}//a", "empty segment"),
        (f"{CONTAINER_URL}/a%2F%2Fb", "empty segment"),
        (f"{CONTAINER_URL}/a\\b", "backslash"),
        (f"{CONTAINER_URL}/a%5Cb", "backslash"),
        (f"{CONTAINER_URL}/a\n", "control characters"),
        (f"{CONTAINER_URL}/a%0Ab", "control characters"),
        (f"{CONTAINER_URL}/a%7F", "control characters"),
        (f"{CONTAINER_URL}/a%C2%81", "control characters"),
        (f"{CONTAINER_URL}/%FF", "not valid UTF-8"),
        (f"{CONTAINER_URL}/\ud800", "not valid UTF-8"),
        (f"{CONTAINER_URL}/a#1", "%23"),
        (f"{CONTAINER_URL}/a?{SAS}#1", "%23"),
        (f"{CONTAINER_URL}/a?x=1", "not a shared access signature"),
        (f"{CONTAINER_URL}/a?sv=2025-01-05&sig=", "not a shared access signature"),
        (f"{CONTAINER_URL}/a?sv=2025-01-05&sig=a b", "not a shared access signature"),
        (f"{CONTAINER_URL}?restype=container&comp=list&{SAS}", "belongs to a request"),
        (f"{CONTAINER_URL}/a%3F{SAS}", "looks like a SAS"),
        (f"{CONTAINER_URL}?snapshot={SNAPSHOT}", "belongs to a blob"),
        (f"{CONTAINER_URL}/a?snapshot=yesterday", "timestamp"),
        (f"{CONTAINER_URL}/a?snapshot={SNAPSHOT}&versionid={SNAPSHOT}", "one of the two"),
        ("/mnt/checkpoints/run-7", "local path"),
        ("checkpoints/run-7", "local path"),
        ("C:\\checkpoints", "local path"),
        ("C:/checkpoints", "local path"),
        ("file:///mnt/checkpoints", "local path"),
        ("", "local path"),
        ("acct.blob.core.windows.net/ckpt/a", "Put https:// before it"),
        ("s3://bucket/key", "https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH"),
        ("gs://bucket/key", "https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH"),
        ("abfs://ckpt@acct.dfs.core.windows.net/a", "Instead of abfs://CONTAINER@ACCOUNT"),
        ("abfss://ckpt@acct.dfs.core.windows.net/a", "Instead of abfss://CONTAINER@ACCOUNT"),
        ("wasbs://ckpt@acct.blob.core.windows.net/a", "Instead of wasbs://CONTAINER@ACCOUNT"),
        ("az://ckpt/a", "Instead of az://CONTAINER"),
        ("https:///acct.blob.core.windows.net/ckpt", "no host"),
        ("https:acct.blob.core.windows.net/ckpt", "no host"),
        ("https://", "no host"),
        ("https://my host.org/ckpt", "malformed"),
        ("https://my.host:port/ckpt", "malformed"),
        ("https://my.host:99999/ckpt", "malformed"),
        ("https://my..host/ckpt", "malformed"),
        ("https://[::zz]/acct/ckpt", "malformed"),
        ("http://acct.blob.core.windows.net/ckpt", "starts with https://"),
        ("https://acct.file.core.windows.net/ckpt", "is the file service"),
        ("https://blob.core.windows.net/ckpt", "does not start with a storage account's name"),
        ("https://my_acct.blob.core.windows.net/ckpt", "does not start with a storage account's name"),
        ("azblob://ab/ckpt", "azblob:// takes an account's name"),
        ("azblob://127.0.0.1:10000/devstoreaccount1/ckpt", "http://127.0.0.1:10000/devstoreaccount1/CONTAINER/PATH"),
    ],
)
def test_what_is_refused(url: str, says: str) -> None:
    with pytest.raises(LocationError) as caught:
        BlobLocation.parse(url)
    assert says in str(caught.value)
    assert "Signature" not in str(caught.value)


@pytest.mark.parametrize("url", [3, None, b"https://acct.blob.core.windows.net/ckpt"])
def test_other_types_are_refused_with_our_error(url: object) -> None:
    with pytest.raises(LocationError, match=f"not {type(url).__name__}"):
        BlobLocation.parse(url)  # type: ignore[arg-type]


def test_user_and_password_are_refused_and_not_repeated() -> None:
    with pytest.raises(LocationError) as caught:
        BlobLocation.parse("https://someone:hunter2@acct.blob.core.windows.net/ckpt")
    assert "hunter2" not in str(caught.value) and "someone" not in str(caught.value)


@pytest.mark.parametrize("key", ["snapshot", "versionid"])
def test_snapshot_and_version_are_kept_beside_the_sas(key: str) -> None:
    first, second = SAS.split("&", 1)
    location = BlobLocation.parse(f"{CONTAINER_URL}/a?{first}&{key}={SNAPSHOT.replace(':', '%3A')}&{second}")
    assert location.sas == SAS
    assert (location.snapshot, location.version_id) == ((SNAPSHOT, None) if key == "snapshot" else (None, SNAPSHOT))
    assert str(location) == f"{CONTAINER_URL}/a?{key}={SNAPSHOT}"
    assert BlobLocation.parse(str(location)) == location.without_sas()
    assert BlobLocation.parse(location.azblob) == location.without_sas()


def test_lightning_names_stay_readable() -> None:
    url = f"{CONTAINER_URL}/run/epoch=1-step=200.ckpt"
    assert str(BlobLocation.parse(url)) == url


def test_name_parent_and_container_root() -> None:
    location = BlobLocation.parse(f"{CONTAINER_URL}/a/b/c?{SAS}")
    assert location.name == "c"
    assert location.parent.path == "a/b" and location.parent.sas == SAS
    assert location.parent.parent.parent == location.container_root() == location.container_root().parent
    assert location.container_root().name == ""


def test_the_parent_of_a_snapshot_is_no_snapshot() -> None:
    location = BlobLocation.parse(f"{CONTAINER_URL}/a/b?snapshot={SNAPSHOT}")
    assert location.parent == BlobLocation.parse(f"{CONTAINER_URL}/a")
    assert location.container_root() == BlobLocation.parse(CONTAINER_URL)


def test_join() -> None:
    root = BlobLocation.parse(f"{CONTAINER_URL}?{SAS}")
    assert root.join("a").join("b/c", "50%.pt") == BlobLocation.parse(f"{CONTAINER_URL}/a/b/c/50%25.pt?{SAS}")
    assert root.join() == root


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "..", "a/../b", ".", "a\\b", "a\nb", "x" * 1025])
def test_join_refuses(name: str) -> None:
    for location in (BlobLocation.parse(CONTAINER_URL), BlobLocation.parse(f"{CONTAINER_URL}/run")):
        with pytest.raises(LocationError):
            location.join(name)


def test_nothing_lies_below_a_snapshot() -> None:
    with pytest.raises(LocationError, match="one blob at one moment"):
        BlobLocation.parse(f"{CONTAINER_URL}/a?snapshot={SNAPSHOT}").join("b")


@pytest.mark.parametrize(
    ("url", "tls", "path_style", "emulator", "account_known"),
    [
        ("https://acct.blob.core.windows.net/ckpt", True, False, False, True),
        ("https://acct.z01.blob.storage.azure.net/ckpt", True, False, False, True),
        ("https://my.host/ckpt", True, False, False, False),
        ("http://devstoreaccount1.my.host/ckpt", False, False, False, False),
        ("http://127.0.0.1:10000/devstoreaccount1/ckpt", False, True, True, True),
        ("https://azurite:10000/devstoreaccount1/ckpt", True, True, True, True),
        ("http://127.0.0.1:10000/other/ckpt", False, True, False, True),
    ],
)
def test_what_kind_of_endpoint(url: str, tls: bool, path_style: bool, emulator: bool, account_known: bool) -> None:
    location = BlobLocation.parse(url)
    assert (location.is_tls, location.is_path_style, location.is_emulator) == (tls, path_style, emulator)
    assert location.account_is_known == account_known


@pytest.mark.parametrize(
    ("url", "azblob"),
    [
        ("https://acct.blob.core.windows.net/ckpt/a%20b", "azblob://acct/ckpt/a%20b"),
        ("https://acct.blob.core.windows.net/ckpt", "azblob://acct/ckpt"),
        ("https://acct.dfs.core.windows.net/ckpt/a", "azblob://acct/ckpt/a"),
        ("https://acct-secondary.blob.core.windows.net/ckpt", "azblob://acct-secondary.blob.core.windows.net/ckpt"),
        ("https://acct.blob.core.cloudapi.de/ckpt/a", "azblob://acct.blob.core.cloudapi.de/ckpt/a"),
        ("https://my.host:8443/ckpt/a", "azblob://my.host:8443/ckpt/a"),
    ],
)
def test_the_azblob_form(url: str, azblob: str) -> None:
    location = BlobLocation.parse(f"{url}?{SAS}")
    assert location.azblob == azblob
    assert BlobLocation.parse(azblob) == location.without_sas()


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:10000/devstoreaccount1", "https://localhost/acct", "http://my.host"]
)
def test_there_is_no_azblob_form_of_a_path_style_or_plain_endpoint(endpoint: str) -> None:
    location = BlobLocation.parse(f"{endpoint}/ckpt/a")
    with pytest.raises(LocationError, match="no azblob:// form"):
        _ = location.azblob


def test_the_sas_is_part_of_the_value_and_of_the_pickle() -> None:
    location = BlobLocation.parse(f"{CONTAINER_URL}/a?{SAS}")
    assert location != location.without_sas()
    assert len({location, location.without_sas(), BlobLocation.parse(f"{CONTAINER_URL}/a?{SAS}")}) == 2
    assert pickle.loads(pickle.dumps(location)) == location


def test_repr_tells_that_there_is_a_sas() -> None:
    assert repr(BlobLocation.parse(f"{CONTAINER_URL}/a?{SAS}")) == f"BlobLocation('{CONTAINER_URL}/a', sas=***)"
    assert repr(BlobLocation.parse(f"{CONTAINER_URL}/a")) == f"BlobLocation('{CONTAINER_URL}/a')"


accounts = st.from_regex(r"[a-z0-9]{3,24}", fullmatch=True)
containers = st.from_regex(r"[a-z0-9]{1,10}(-[a-z0-9]{1,10}){1,4}", fullmatch=True) | st.just("$root")
segments = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\\u2028\u2029"), min_size=1, max_size=12
).filter(lambda segment: segment not in (".", ".."))
paths = st.lists(segments, max_size=5).map("/".join)
endpoints = accounts.flatmap(
    lambda account: st.sampled_from(
        [
            f"https://{account}.blob.core.windows.net",
            f"https://{account}.z07.blob.storage.azure.net",
            f"https://{account}-secondary.blob.core.usgovcloudapi.net",
            f"https://{account}.example.org:8443",
            f"http://10.0.0.7:10000/{account}",
            f"http://azurite/{account}",
        ]
    )
)
secrets = st.from_regex(r"[A-Za-z0-9]{24}", fullmatch=True)


@settings(deadline=None)
@given(endpoints, containers, paths)
def test_every_location_comes_back_from_its_url(endpoint: str, container: str, path: str) -> None:
    root = BlobLocation.parse(f"{endpoint}/{container}")
    location = root.join(path) if path else root
    assert location.path == path
    assert location.endpoint == endpoint and location.container == container
    assert BlobLocation.parse(str(location)) == location
    assert str(location).isascii()
    if location.is_tls and not location.is_path_style:
        assert BlobLocation.parse(location.azblob) == location


@settings(deadline=None)
@given(endpoints, containers, paths, secrets)
def test_a_sas_never_shows(endpoint: str, container: str, path: str, secret: str) -> None:
    root = BlobLocation.parse(f"{endpoint}/{container}?sv=2025-01-05&sp=rw&sig={secret}%3D&se=2026-12-31")
    location = root.join(path, "x") if path else root
    assert location.sas is not None and secret in location.sas
    shown = [str(location), repr(location), f"{location}", repr([location]), str(location.parent)]
    if location.is_tls and not location.is_path_style:
        shown.append(location.azblob)
    assert not any(secret in text for text in shown)
    with pytest.raises(LocationError) as caught:
        location.join("..")
    assert secret not in str(caught.value)


@settings(deadline=None)
@given(
    st.sampled_from(
        [
            "https://acct.blob.core.windows.net",
            "https://acct.blob.core.windows.net/Bad_Container/a",
            "https://acct.blob.core.windows.net/ckpt/a//b",
            "https://acct.blob.core.windows.net/ckpt/../b",
            "https://acct.blob.core.windows.net/ckpt/%FF",
            "https://acct.blob.core.windows.net:port/ckpt",
            "https://acct.table.core.windows.net/ckpt",
            "http://acct.blob.core.windows.net/ckpt",
            "http://127.0.0.1:10000",
            "http://127.0.0.1:10000/acct",
            "azblob://127.0.0.1/ckpt",
            "acct.blob.core.windows.net/ckpt",
            "abfs://ckpt@acct.dfs.core.windows.net/ckpt",
            "s3://bucket/key",
            "/mnt/data",
            "https:///ckpt",
        ]
    ),
    st.sampled_from(["?sv=1&sig={}%3D", "/?sig={}", "?sv=1&sig={}%3D#x", "?sig={}\n", "?restype=container&sig={}"]),
    secrets,
)
def test_no_error_repeats_the_query(url: str, query: str, secret: str) -> None:
    with pytest.raises(LocationError) as caught:
        BlobLocation.parse(url + query.format(secret))
    error: BaseException | None = caught.value
    while error is not None:
        assert secret not in str(error) and secret not in repr(error)
        error = error.__cause__ or error.__context__


@settings(deadline=None)
@given(
    st.sampled_from(
        [
            "https://user:{}@acct.blob.core.windows.net/ckpt",
            "https://{}@acct.blob.core.windows.net/ckpt",
            "https://acct.blob.core.windows.net/sv=1&sig={}%3D",
            "https://acct.blob.core.windows.net/ckpt/a&sv=1&sig={}",
            "https://acct.blob.core.windows.net/ckpt/a%3Fsv=1%26sig={}",
            "https://acct.blob.core.windows.net/ckpt//a=&s={}",
            "https://acct.blob.core.windows.net/ckpt?{}",
            "https://acct.blob.core.windows.net/ckpt/a?snapshot={}",
            "https://acct.blob.core.windows.net/ckpt/a#{}",
            "DefaultEndpointsProtocol=https;AccountName=acct;AccountKey={}==",
            "?sv=1&sig={}",
            "{}==",
        ]
    ),
    secrets,
)
def test_a_secret_in_a_wrong_place_is_not_repeated(template: str, secret: str) -> None:
    with pytest.raises(LocationError) as caught:
        BlobLocation.parse(template.format(secret))
    assert secret not in str(caught.value)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_parse_takes_a_text_or_refuses_it_with_our_error(text: str) -> None:
    for url in (text, f"https://{text}", f"{CONTAINER_URL}/{text}", f"http://127.0.0.1/acct/ckpt/{text}"):
        try:
            location = BlobLocation.parse(url)
        except LocationError:
            continue
        assert BlobLocation.parse(str(location)) == location.without_sas()
