"""The tests of uvicorn that cannot hold over a tunnel, with the reason."""

from __future__ import annotations

__all__ = ["DESELECTED"]

_PORT = "about a socket of one's own, and a tunnel opens none"
_RUN = "about uvicorn.run(), which has its own server; ours is reached by tunnel_asgi.serve() and the command line"
_EXIT = "uvicorn exits the process; ours raises, and only the command line exits (test_cli.py, test_server.py)"
_HEAD = "our limit is another, the same for both parsers, and answered with 431 instead of 400 (test_guard.py)"
_ABORT = (
    "a race in the visitor, seen in one run of eight: the relay reads on, so the visitor's buffer empties, asyncio "
    "closes its transport, and websockets aborts it then: AttributeError in asyncio, with or without a tunnel"
)
_BIG = "tests/protocols/test_websocket.py::test_send_binary_data_to_server_bigger_than_default_on_websockets"

DESELECTED: dict[str, str] = {
    "tests/protocols/test_http.py::test_huge_headers_h11protocol_failure": _HEAD,
    "tests/protocols/test_http.py::test_huge_headers_h11protocol_failure_with_setting": _HEAD,
    "tests/protocols/test_http.py::test_huge_headers_h11_max_incomplete": _HEAD,
    "tests/protocols/test_http.py::test_huge_headers_httptools": _HEAD,
    "tests/protocols/test_http.py::test_huge_headers_httptools_will_pass": _HEAD,
    "tests/protocols/test_http.py::test_shutdown_during_idle": (
        "a visitor who came just before is no idle one: its request is on the way, and has a second (test_guard.py)"
    ),
    f"{_BIG}[h11-max=defaults sent=defaults+1]": _ABORT,
    f"{_BIG}[httptools-max=defaults sent=defaults+1]": _ABORT,
    "tests/test_server.py::test_run_exits_with_startup_failure_on_unloadable_app": _EXIT,
    "tests/test_main.py::test_run[ipv6]": "the test's port is the relay's, which listens on 127.0.0.1",
    "tests/test_main.py::test_exit_on_create_server_with_invalid_host": _PORT,
    "tests/test_main.py::test_run_invalid_app_config_combination": _RUN,
    "tests/test_main.py::test_run_fails_fast_in_parent_on_bad_app_path": _RUN,
    "tests/test_main.py::test_run_skips_eager_app_import_with_workers": _RUN,
    "tests/test_main.py::test_run_imports_app_before_starting_event_loop": _RUN,
    "tests/test_main.py::test_run_startup_failure": _RUN,
    "tests/test_main.py::test_run_match_config_params": _RUN,
    "tests/test_main.py::test_deprecated_server_state_from_main": _RUN,
    "tests/middleware/test_logging.py::test_default_logging": "our start message names the public URL, not a port",
    "tests/middleware/test_logging.py::test_running_log_using_uds": _PORT,
    "tests/middleware/test_logging.py::test_running_log_using_fd": _PORT,
    "tests/middleware/test_logging.py::test_server_start_with_port_zero": _PORT,
    "tests/supervisors/test_signal.py::test_sigint_deny_request_after_triggered": (
        "expects a port that refuses; here the relay takes the visitor, holds it and answers 503 (test_relay.py)"
    ),
}
