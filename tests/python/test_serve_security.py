"""Keys, hosts, origins, the page's files, and what logs say."""

import json
import socket

import httpx
import pytest

from serving import serving
from star_attention.errors import UserError
from star_attention.serve import page
from star_attention.serve.auth import ENVIRONMENT, read_api_keys
from star_attention.serve.hosts import is_loopback

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "a secret question"}]}
KEYS = ("key-one", "key-two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    (folder / "secret.txt").write_text("secret")
    (folder / "page").mkdir()
    (folder / "page" / "index.html").write_text("<!doctype html><title>Page</title>")
    (folder / "page" / "page.js").write_text("let a")
    (folder / "page" / "link").symlink_to(folder / "secret.txt")
    return folder / "page"


@pytest.fixture(scope="module")
def server(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "FOLDER", folder)
        with serving(api_keys=KEYS) as running:
            yield running


@pytest.fixture(scope="module")
def open_server():
    with serving(allowed_hosts=("mine.example",)) as running:
        yield running


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url) as http:
        yield http


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", KEYS)
def test_keys_open(http, key):
    assert http.post(CHAT, json=BODY, headers=bearer(key)).status_code == 200
    assert http.get("/metrics", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        bearer("key"),
        bearer("key-one2"),
        bearer("key-one key-two"),
        {"Authorization": "Basic key-one"},
        {"Authorization": "key-one"},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CHAT),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("POST", "/tokenize"),
        ("GET", "/openapi.json"),
        ("GET", "/v1/contexts"),
        ("GET", "/nothing"),
        ("GET", "//v1/models"),
        ("GET", "/page/../v1/models"),
        ("GET", "/page/%2e%2e/v1/models"),
    ],
)
def test_the_api_is_closed(server, headers, method, path):
    response = httpx.request(method, server.url + path, headers=headers)
    if path.startswith("/page"):  # needs no key, and leads nowhere
        assert response.status_code in (401, 404)
        return
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/version", "/", "/page/page.js"])
def test_what_needs_no_key(http, path):
    assert http.get(path).status_code == 200


def test_keys_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, " a, b,,a")
    file = tmp_path / "keys"
    file.write_text("# ours\nc  # Ann's\n\n b\n")
    assert read_api_keys(file) == ("a", "b", "c")
    assert read_api_keys(None) == ("a", "b")
    file.write_text("# none\n")
    with pytest.raises(UserError, match="holds no key"):
        read_api_keys(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_api_keys(tmp_path / "nothing")


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/page/index.html"])
def test_headers_of_the_page(http, path):
    headers = http.get(path).headers
    assert headers["content-security-policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    [
        "/page/../secret.txt",
        "/page/..%2fsecret.txt",
        "/page/%2e%2e/secret.txt",
        "/page/%2e%2e%2fsecret.txt",
        "/page/..%5csecret.txt",
        "/page//etc/passwd",
        "/page/%2fetc/passwd",
        "/page/link",
        "/page/",
        "/page/a%00b",
        "/page/" + "a" * 5000,
    ],
)
def test_paths_that_lead_out(server, path):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    assert answer.split()[1] in (b"404", b"401"), answer
    assert b"secret" not in answer.partition(b"\r\n\r\n")[2]
    assert b"root:" not in answer


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fetc", "a%00", ".hidden", "a b"])
@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH"])
def test_names_that_lead_out(http, method, name):
    headers = {**bearer("key-one"), "content-type": "application/json"}
    response = http.request(method, f"/v1/contexts/{name}", headers=headers, content=b"{}")
    assert response.status_code in (404, 405)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1234", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
        ("mine.example", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example:80@localhost", 200),  # what names it is localhost, as in a URL
        ("127.0.0.1.evil.example", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_hosts_on_loopback(open_server, host, status):
    response = httpx.get(f"{open_server.url}/health", headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_which_addresses_are_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


def test_origins():
    with serving(cors_origins=("https://ok.example",)) as running:
        own = f"http://127.0.0.1:{running.port}"
        for origin, status in (
            (own, 200),
            ("https://ok.example", 200),
            ("https://evil.example", 403),
            ("null", 403),
            (f"http://127.0.0.1:{running.port + 1}", 403),
        ):
            response = httpx.post(running.url + CHAT, json=BODY, headers={"Origin": origin})
            assert response.status_code == status, origin
            allowed = response.headers.get("access-control-allow-origin")
            assert allowed == ("https://ok.example" if origin == "https://ok.example" else None)
        preflight = httpx.options(
            running.url + CHAT,
            headers={
                "Origin": "https://ok.example",
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization",
            },
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://ok.example"


def test_no_cors_by_default(http):
    response = http.get("/health")
    assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("my-id_1.2", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("", False)],
)
def test_request_ids(http, sent, kept):
    response = http.get("/health", headers={"X-Request-Id": sent})
    assert (response.headers["x-request-id"] == sent) == kept
    assert response.headers["x-request-id"]


def test_logs_are_json_without_texts_and_keys(capfd):
    headers = {**bearer("key-one"), "X-Request-Id": "mine"}
    with serving(api_keys=KEYS) as running, httpx.Client(base_url=running.url) as http:
        http.post(f"{CHAT}?q=a-secret-query", json=BODY, headers=headers)
        http.post(CHAT, json=BODY, headers=bearer("a-wrong-secret"))
        http.get("/a-secret-path")
    err = capfd.readouterr().err
    lines = [json.loads(line) for line in err.splitlines()]
    assert "secret" not in err
    assert "key-" not in err
    line = next(line for line in lines if line.get("id") == "mine")
    assert (line["path"], line["status"], line["method"]) == (CHAT, 200, "POST")
    assert line["completion_tokens"] > 0


def test_paths_in_metrics_are_routes(http):
    for index in range(5):
        http.get(f"/v1/models/{index}", headers=bearer("key-one"))
        http.request(f"ODD{index}", f"/{index}", headers=bearer("key-one"))
    lines = http.get("/metrics", headers=bearer("key-one")).text.splitlines()
    paths = {line.partition('path="')[2].partition('"')[0] for line in lines if "path=" in line}
    assert "unmatched" in paths
    assert not any(path.strip("/").isdecimal() for path in paths)
    assert len(paths) < 20
