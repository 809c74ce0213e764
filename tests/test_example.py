"""The example under uvicorn, as its README says; the tunnel is not in play here."""

import asyncio
import hashlib
import json
import logging
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from starlette.types import Message
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from examples.fastapi_app import main

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host, port = listening.getsockname()
        server = uvicorn.Server(uvicorn.Config(main.app, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"{host}:{port}"
        server.should_exit = True
        thread.join()


@pytest.fixture(autouse=True)
def board(monkeypatch: pytest.MonkeyPatch) -> main.Board:
    fresh = main.Board()
    monkeypatch.setattr(main, "board", fresh)
    return fresh


@pytest.fixture
def client(address: str, caplog: pytest.LogCaptureFixture) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address}", trust_env=False) as client:
        yield client
    assert not [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]


def open_board(address: str) -> ClientConnection:
    return connect(f"ws://{address}/board", proxy=None)


def say(ws: ClientConnection, **note: str) -> None:
    ws.send(json.dumps(note))


def hear(ws: ClientConnection) -> tuple[str, str]:
    note = json.loads(ws.recv())
    return note["name"], note["text"]


def test_the_page_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<h1>Hello from a tunnel</h1>" in page.text
    assert "https:" not in page.text
    assert "http:" not in page.text.replace("xmlns='http://www.w3.org/2000/svg'", "")


def test_the_page_answers_head_without_a_body(client: httpx.Client) -> None:
    head = client.head("/")

    assert head.status_code == 200
    assert head.content == b""


def test_a_visitor_learns_its_address_and_url(client: httpx.Client, address: str) -> None:
    assert client.get("/visit").json() == {
        "address": "127.0.0.1",
        "url": f"http://{address}/",
        "spoken": "http, HTTP/1.1",
    }


def test_the_docs_describe_the_app(client: httpx.Client) -> None:
    assert client.get("/docs").status_code == 200
    assert {"/visit", "/ticks", "/upload"} <= client.get("/openapi.json").json()["paths"].keys()


def test_an_upload_is_answered_with_its_size_and_checksum(client: httpx.Client) -> None:
    body = bytes(range(256)) * 20_000

    answer = client.post("/upload", content=(body[start : start + 70_000] for start in range(0, len(body), 70_000)))

    assert answer.json() == {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def test_an_empty_upload_has_the_checksum_of_nothing(client: httpx.Client) -> None:
    assert client.post("/upload").json() == {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}


@pytest.mark.parametrize("mebibytes", [1, 3])
def test_a_download_has_the_size_and_checksum_it_announces(client: httpx.Client, mebibytes: int) -> None:
    answer = client.get(f"/download/{mebibytes}")

    assert len(answer.content) == mebibytes * MIB
    assert answer.headers["content-length"] == str(mebibytes * MIB)
    assert answer.headers["x-sha256"] == hashlib.sha256(answer.content).hexdigest()


@pytest.mark.parametrize("mebibytes", ["0", "1025", "-1", "much"])
def test_a_download_is_bounded(client: httpx.Client, mebibytes: str) -> None:
    assert client.get(f"/download/{mebibytes}").status_code == 422


def test_the_ticker_sends_the_time_and_who_is_online(client: httpx.Client, address: str) -> None:
    with open_board(address) as ws, client.stream("GET", "/ticks") as answer:
        say(ws, text="here")  # answered, so the board counts us
        hear(ws)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = (json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line)
        first, second = next(events), next(events)

    assert first["time"] < second["time"]
    assert second["online"] == 1


def test_a_note_reaches_everyone_and_those_who_come_later(client: httpx.Client, address: str) -> None:
    with open_board(address) as ada, open_board(address) as bob:
        say(ada, name="Ada", text="  hello  ")
        assert hear(ada) == hear(bob) == ("Ada", "hello")
        say(bob, text="<b>hi</b>")
        assert hear(ada) == hear(bob) == ("", "<b>hi</b>")

        with open_board(address) as late:
            assert [hear(late), hear(late)] == [("Ada", "hello"), ("", "<b>hi</b>")]


def test_a_new_visitor_gets_the_latest_notes_only(client: httpx.Client, address: str, board: main.Board) -> None:
    for number in range(main.HISTORY + 5):
        board.post(main.Note(text=f"{number}"))

    with open_board(address) as ws:
        assert [hear(ws)[1] for _ in range(main.HISTORY)] == [f"{number}" for number in range(5, main.HISTORY + 5)]


def test_the_time_of_a_note_is_the_servers(client: httpx.Client, address: str) -> None:
    with open_board(address) as ws:
        say(ws, text="from the past", time="1999-01-01T00:00:00Z")
        assert not json.loads(ws.recv())["time"].startswith("1999")


@pytest.mark.parametrize(
    "message",
    ["", "nonsense", "{}", '{"text": " "}', json.dumps({"text": "x" * 281}), '{"name": 1, "text": "x"}', b"\0"],
    ids=["empty", "not JSON", "no text", "blank", "too long", "name is no string", "binary"],
)
def test_a_note_out_of_form_ends_only_its_senders_connection(
    client: httpx.Client, address: str, message: str | bytes
) -> None:
    with open_board(address) as clumsy, open_board(address) as other:
        clumsy.send(message)
        with pytest.raises(ConnectionClosed) as caught:
            clumsy.recv()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1008

        say(other, text="still here")
        assert hear(other) == ("", "still here")


def test_a_visitor_who_left_is_forgotten(client: httpx.Client, address: str, board: main.Board) -> None:
    left = threading.Event()

    class Inboxes(list[asyncio.Queue[main.Note]]):
        def remove(self, inbox: asyncio.Queue[main.Note]) -> None:
            super().remove(inbox)
            left.set()

    board.inboxes = Inboxes()
    with open_board(address) as ws:
        say(ws, text="goodbye")
        hear(ws)
        assert len(board.inboxes) == 1

    assert left.wait(timeout=10)
    assert not board.inboxes


def test_a_slow_visitor_loses_the_oldest_notes(board: main.Board) -> None:
    with board.visitor() as inbox:
        for number in range(main.BACKLOG + 3):
            board.post(main.Note(text=f"{number}"))

        assert inbox.qsize() == main.BACKLOG
        assert inbox.get_nowait().text == "3"


def test_a_visitor_who_takes_nothing_is_let_go(board: main.Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "STALLED", 0.01)
    board.post(main.Note(text="unread"))

    async def visit() -> None:
        incoming: asyncio.Queue[Message] = asyncio.Queue()
        incoming.put_nowait({"type": "websocket.connect"})
        never = asyncio.Event()

        async def send(message: Message) -> None:
            if message["type"] == "websocket.send":
                await never.wait()

        scope = {"type": "websocket", "path": "/board", "headers": [], "query_string": b""}
        await main.app(scope, incoming.get, send)

    asyncio.run(visit())
    assert not board.inboxes


def test_an_upload_cut_short_is_no_error_of_the_app() -> None:
    sent: list[Message] = []

    async def upload() -> None:
        incoming: asyncio.Queue[Message] = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": b"half", "more_body": True})
        incoming.put_nowait({"type": "http.disconnect"})

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/upload", "headers": [], "query_string": b""}
        await main.app(scope, incoming.get, send)

    asyncio.run(upload())
    assert sent[0]["status"] == 400
