"""The example page in a real browser, through the embedded relay."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from websockets.sync.client import ClientConnection, connect

from tests.processes import DEADLINE, Running

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
ROOT = Path(__file__).parent.parent
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-sync",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-breakpad",
    "--disable-crash-reporter",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-port=0",
    "--window-size=1000,1150",
)

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (Debian, Ubuntu: apt install chromium)"),
    pytest.mark.timeout(120),
]


class Page:
    """A browser tab, driven through the DevTools protocol."""

    def __init__(self, ws: ClientConnection) -> None:
        self._ws = ws
        self._calls = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        self._ws.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while (message := self._receive()).get("id") != self._calls:
            pass
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    def open(self, url: str) -> None:
        """Go there and wait until it is loaded."""
        self.events.clear()
        assert "errorText" not in self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        outcome = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in outcome, outcome
        return outcome["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """The value of the expression, once a change of the page has made it true."""
        return self.evaluate(
            f"""new Promise((resolve, reject) => {{
                const look = () => {{ const found = {condition}; if (found) resolve(found); }};
                new MutationObserver(look).observe(
                    document, {{subtree: true, childList: true, characterData: true, attributes: true}});
                setTimeout(() => reject(new Error("never came: " + document.body.innerText)), {DEADLINE * 1000});
                look();
            }})"""
        )

    def type(self, field: str, text: str) -> None:
        self.evaluate(f"document.querySelector({field!r}).focus()")
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", windowsVirtualKeyCode=13)

    def choose_file(self, field: str, path: Path) -> None:
        handle = self.call("Runtime.evaluate", expression=f"document.querySelector({field!r})")["result"]["objectId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=handle)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[dict[str, Any]]:
        """Uncaught exceptions, failed requests and errors of the console."""
        return [
            event
            for event in self.events
            if event["method"] in ("Runtime.exceptionThrown", "Network.loadingFailed")
            or (event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error")
        ]

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._ws.recv(DEADLINE))
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def browsing(folder: Path, *flags: str) -> Iterator[Page]:
    """A tab of a browser of its own."""
    command = (CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "about:blank")
    with Running(cwd=folder, command=command) as browser:
        port = urlsplit(browser.expect(r"DevTools listening on (\S+)")[1]).port
        tabs = httpx.get(f"http://127.0.0.1:{port}/json/list", trust_env=False, timeout=DEADLINE).json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, proxy=None, max_size=None, compression=None, open_timeout=DEADLINE) as ws:
            page = Page(ws)
            yield page
            page.call("Browser.close")
        browser.wait()  # with all its helpers


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, Running]]:
    arguments = ["examples.fastapi_app.main:app", "--app-dir", str(ROOT), "--local", "--port", "0", *options]
    with Running(*arguments, cwd=folder, env={"PYTHONPATH": str(ROOT)}) as app:
        yield app.url(), app
        assert app.stop() == 0
        assert "Traceback" not in app.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(folder) as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser(folder: Path, url: str) -> Iterator[Page]:  # the app outlives it: an open page would delay the app's end
    with browsing(folder) as page:
        yield page


@pytest.fixture
def page(browser: Page, url: str) -> Iterator[Page]:
    """The example page, its board live."""
    browser.open(url)
    browser.wait_for("document.getElementById('state').textContent === 'live'")
    yield browser
    assert not browser.complaints()


def open_board(url: str) -> ClientConnection:
    return connect(f"{url.replace('http', 'ws')}/board", proxy=None, open_timeout=DEADLINE)


def hear(ws: ClientConnection, text: str) -> dict[str, Any]:
    """The note with this text; earlier ones may come first."""
    while True:
        note: dict[str, Any] = json.loads(ws.recv(DEADLINE))
        if note["text"] == text:
            return note


def test_the_page_loads_and_knows_its_visitor(page: Page, url: str) -> None:
    assert page.evaluate("document.title") == "Hello from a tunnel"
    assert (
        page.wait_for("document.getElementById('url').textContent.startsWith('http') && url.textContent") == f"{url}/"
    )
    assert page.evaluate("document.getElementById('address').textContent") == "127.0.0.1"
    assert page.evaluate("document.getElementById('spoken').textContent") == "http, HTTP/1.1"


def test_a_note_of_another_client_appears_in_the_page(page: Page, url: str) -> None:
    with open_board(url) as ws:
        ws.send(json.dumps({"name": "Ada", "text": "<b>hello</b> from afar"}))
        shown = page.wait_for(
            "[...document.querySelectorAll('#notes li')].map(li => li.innerText).find(t => t.includes('from afar'))"
        )
    assert "Ada" in shown
    assert "<b>hello</b> from afar" in shown


def test_what_is_typed_in_the_page_reaches_another_client(page: Page, url: str) -> None:
    with open_board(url) as ws:
        page.type("input[name=name]", "Grace")
        page.type("input[name=text]", "typed by hand \N{GREEK SMALL LETTER LAMDA}")
        page.press_enter()
        assert hear(ws, "typed by hand \N{GREEK SMALL LETTER LAMDA}")["name"] == "Grace"
    page.wait_for("document.getElementById('notes').innerText.includes('typed by hand')")


def test_the_ticker_ticks(page: Page) -> None:
    first = page.wait_for("/^\\d/.test(document.getElementById('clock').textContent) && clock.textContent")
    second = page.wait_for(f"document.getElementById('clock').textContent !== {first!r} && clock.textContent")
    assert second > first or second.startswith("00:")
    assert page.wait_for("document.getElementById('online').textContent.includes('online') && online.textContent")


def test_an_upload_shows_the_right_checksum(page: Page, folder: Path) -> None:
    content = hashlib.shake_256(b"upload").digest(3_000_001)
    (folder / "upload.bin").write_bytes(content)
    page.choose_file("#file", folder / "upload.bin")
    shown = page.wait_for("document.getElementById('result').textContent.includes('SHA') && result.textContent")
    assert hashlib.sha256(content).hexdigest() in shown
    assert shown.startswith("3,000,001 bytes")


def test_a_download_arrives_whole(page: Page) -> None:
    equal = page.evaluate(
        """(async () => {
            const response = await fetch("download/5");
            const digest = await crypto.subtle.digest("SHA-256", await response.arrayBuffer());
            const hex = [...new Uint8Array(digest)].map(b => b.toString(16).padStart(2, "0")).join("");
            return hex === response.headers.get("X-SHA256");
        })()"""
    )
    assert equal is True


def test_the_docs_of_the_example_are_there(page: Page) -> None:
    assert page.evaluate("fetch('openapi.json').then(r => r.json()).then(d => d.info.title)") == "Hello from a tunnel"


def test_the_page_can_be_looked_at(page: Page, folder: Path) -> None:
    page.wait_for("/^\\d/.test(document.getElementById('clock').textContent)")
    picture = page.screenshot()
    assert picture.startswith(b"\x89PNG")
    (folder / "page.png").write_bytes(picture)


def test_over_https_the_page_is_a_secure_context_and_its_websocket_works(tmp_path: Path) -> None:
    with serving(tmp_path, "--tls") as (url, app):
        ca = next(line.split()[6] for line in app.output.splitlines() if "Development CA" in line)
        port = urlsplit(url).port
        assert port is not None
        # A client that trusts the CA and nothing else vouches for this certificate; the browser is told its key only.
        trust = ssl.create_default_context(cafile=ca)
        certificate = x509.load_pem_x509_certificate(
            ssl.get_server_certificate(("127.0.0.1", port), ca_certs=ca).encode()
        )
        assert httpx.get(url, verify=trust, trust_env=False).status_code == 200
        key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        pin = base64.b64encode(hashlib.sha256(key).digest()).decode()
        with browsing(tmp_path, f"--ignore-certificate-errors-spki-list={pin}") as page:
            page.open(url)
            page.wait_for("document.getElementById('state').textContent === 'live'")
            assert page.evaluate("window.isSecureContext && location.protocol") == "https:"
            assert page.wait_for("spoken.textContent.includes('HTTP') && spoken.textContent") == "https, HTTP/1.1"
            page.type("input[name=text]", "over TLS")
            page.press_enter()
            page.wait_for("document.getElementById('notes').innerText.includes('over TLS')")
            assert not page.complaints()


def test_without_trust_the_browser_refuses_the_development_ca(tmp_path: Path) -> None:
    with serving(tmp_path, "--tls") as (url, _), browsing(tmp_path) as page:
        assert page.call("Page.navigate", url=url)["errorText"] == "net::ERR_CERT_AUTHORITY_INVALID"
