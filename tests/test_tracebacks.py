from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunnel_asgi.server import Config
from tunnel_asgi.tracebacks import failed_while_loading, print_app_frames

APP = """
import json


def create_app():
    return json.loads("{")


def create_with_a_mistake():
    return create_app(1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_factories.py").write_text(APP)
    return tmp_path


def printed(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """Names of the files in the traceback, and its last line."""
    print_app_frames(error)
    text = capsys.readouterr().err
    assert text.count("Traceback") <= 1
    return [Path(file).name for file in re.findall(r'File "(.*?)"', text)], text.splitlines()[-1]


def loading(app: str, *, factory: bool = False) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (whatever the app raises)
        Config(app, factory=factory, local=True, log_config=None).load()
    return caught.value


@pytest.mark.parametrize(
    ("code", "last_line"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("app = (", "SyntaxError: '(' was never closed"),
        ("import missing_package", "ModuleNotFoundError: No module named 'missing_package'"),
        ("raise SystemError('mine')", "SystemError: mine"),
    ],
)
def test_an_app_that_cannot_be_imported_shows_its_own_frames(
    code: str, last_line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "unloadable.py").write_text(code)
    error = loading("unloadable:app")
    assert failed_while_loading(error)
    assert printed(error, capsys) == (["unloadable.py"], last_line)


@pytest.mark.usefixtures("folder")
def test_what_the_app_called_is_shown_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    error = loading("some_factories:create_app", factory=True)
    files, _ = printed(error, capsys)
    assert files[0] == "some_factories.py"
    assert set(files[1:]) <= {"__init__.py", "decoder.py"}  # of json


@pytest.mark.usefixtures("folder")
def test_uvicorns_exit_is_not_shown_as_the_cause_of_a_mistake_in_a_factory(capsys: pytest.CaptureFixture[str]) -> None:
    error = loading("some_factories:create_with_a_mistake", factory=True)
    files, last_line = printed(error, capsys)
    assert files == ["some_factories.py"]
    assert last_line.startswith("TypeError: create_app()")


def test_an_exception_that_did_not_come_from_loading_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    assert not failed_while_loading(caught.value)
    assert not failed_while_loading(ValueError())
    assert printed(caught.value, capsys) == (["test_tracebacks.py"], "ZeroDivisionError: division by zero")
