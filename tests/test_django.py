"""``manage.py runtunnel`` in a project that ``django-admin startproject`` made."""

from __future__ import annotations

import ast
import json
import re
import shutil
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import Running, environment, relay_thread
from tests.support import DOMAIN, KEY_ID, SECRET
from tunnel_asgi.contrib.django.options import OPTIONS, settle
from tunnel_asgi.errors import ConfigError
from tunnel_asgi.server import Config

MANAGE = (sys.executable, "manage.py", "runtunnel")
ORIGIN = f"https://{DOMAIN}"

SETTINGS = """
import json
import os

INSTALLED_APPS += ["tunnel_asgi.contrib.django", "pages"]
ROOT_URLCONF = "pages.urls"
globals().update(json.loads(os.environ.get("SETTINGS", "{}")))
INSTALLED_APPS += globals().get("MORE_APPS", [])
"""

URLS = """
from django.contrib import admin
from django.http import HttpResponse
from django.shortcuts import render
from django.urls import path


def page(request):
    return HttpResponse(f"old {request.build_absolute_uri()} {request.is_secure()}")


def templated(request):
    return render(request, "templated.html")


def fail(request):
    password = "swordfish"
    raise ValueError("a bug in the project")


urlpatterns = [
    path("", page),
    path("templated/", templated),
    path("fail/", fail),
    path("admin/", admin.site.urls),
]
"""

ASGI = """
from django.core.asgi import get_asgi_application

django = get_asgi_application()


async def app(scope, receive, send):
    async def marked(message):
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-served-by", b"pages.asgi")]
        await send(message)

    await django(scope, receive, marked)
"""

FAILING_CHECK = """
from django.core.checks import Error, register

@register
def check(app_configs, **kwargs):
    return [Error("the moon is full", id="pages.E001")]
"""


def manage(folder: Path, *arguments: str, **env: str) -> None:
    subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(folder, **env),
        check=True,
        capture_output=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with its database, which knows one user."""
    folder = tmp_path_factory.mktemp("django")
    manage(folder, "-m", "django", "startproject", "mysite", ".")
    with (folder / "mysite" / "settings.py").open("a") as settings:
        settings.write(SETTINGS)
    pages = folder / "pages"
    (pages / "templates").mkdir(parents=True)
    (pages / "__init__.py").touch()
    (pages / "urls.py").write_text(URLS)
    (pages / "asgi.py").write_text(ASGI)
    (pages / "templates" / "templated.html").write_text("old template")
    manage(folder, "manage.py", "migrate")
    user = {"USERNAME": "ada", "EMAIL": "ada@example.com", "PASSWORD": "lovelace"}
    manage(
        folder,
        *("manage.py", "createsuperuser", "--no-input"),
        **{f"DJANGO_SUPERUSER_{name}": value for name, value in user.items()},
    )
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "project")


def runtunnel(project: Path, *arguments: str, env: dict[str, str] | None = None, **settings: Any) -> Running:
    """The command in a process, in a project with these settings changed."""
    env = {"SETTINGS": json.dumps(settings), "PYTHONUNBUFFERED": "1"} | (env or {})
    return Running(*arguments, command=MANAGE, cwd=project, env=env)


def client(url: str, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=url, trust_env=False, timeout=20, **options)


def csrf_token(page: httpx.Response) -> str:
    match = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page.text)
    assert match, page.text
    return match[1]


def log_in(browser: httpx.Client, **headers: str) -> httpx.Response:
    browser.cookies.clear()
    token = csrf_token(browser.get("/admin/login/"))
    form = {"csrfmiddlewaretoken": token, "username": "ada", "password": "lovelace", "next": "/admin/"}
    return browser.post("/admin/login/", data=form, headers=headers)


def test_a_login_form_posts_through_the_tunnel(project: Path) -> None:
    production: dict[str, Any] = {
        "DEBUG": False,
        "ALLOWED_HOSTS": [],
        "SECURE_SSL_REDIRECT": True,
        "SESSION_COOKIE_SECURE": True,
        "CSRF_COOKIE_SECURE": True,
        "SECURE_PROXY_SSL_HEADER": ("HTTP_X_FORWARDED_PROTO", "https"),
        "USE_X_FORWARDED_HOST": True,
        "LOGGING": {"version": 1},  # which turns off all loggers there are
    }
    with runtunnel(project, "--local", "--tls", "--port", "0", "--noreload", **production) as site:
        ca = site.expect(r"Development CA for this machine: (\S+)")[1]
        url = site.url()
        with client(url, verify=ssl.create_default_context(cafile=ca)) as browser:
            assert browser.get("/").text == f"old {url}/ True"
            claims = {"X-Forwarded-Proto": "http", "X-Forwarded-Host": "evil.example", "X-Forwarded-For": "192.0.2.1"}
            assert browser.get("/", headers=claims).text == f"old {url}/ True"
            answer = log_in(browser, Origin=url)
            assert (answer.status_code, answer.headers["location"]) == (302, "/admin/")
            assert "Welcome," in browser.get("/admin/").text
            assert log_in(browser, Origin="https://evil.example").status_code == 403
            assert browser.get("/", headers={"Host": "evil.example"}).status_code == 400
        assert site.stop() == 0
        assert "WARNING" not in site.output


def test_an_edit_is_served_without_a_gap_and_never_one_that_fails_the_checks(project: Path) -> None:
    urls, models, page = (project / "pages" / name for name in ("urls.py", "models.py", "templates/templated.html"))
    with relay_thread(domain=DOMAIN) as relay:
        setting = {"domain": str(DOMAIN), "key": SECRET, "key_id": KEY_ID, "server_url": relay.relay.server_url}
        with (
            runtunnel(project, TUNNEL_ASGI=setting) as site,
            client(relay.relay.url, headers={"Host": str(DOMAIN)}) as browser,
        ):
            site.expect("WARNING: DEBUG is True")
            site.expect("System check identified no issues")
            assert site.url() == ORIGIN

            assert browser.get("/").text == f"old {ORIGIN}/ True"
            assert browser.get("/", headers={"Host": "localhost"}).status_code == 400
            assert log_in(browser, Origin=ORIGIN).status_code == 302
            assert log_in(browser, Origin=f"{ORIGIN}:8443").status_code == 403
            assert "body" in browser.get("/static/admin/css/base.css").text
            report = browser.get("/fail/").text
            assert "a bug in the project" in report
            assert "TUNNEL_ASGI" in report
            assert SECRET not in report

            assert browser.get("/templated/").text == "old template"
            page.write_text("new template")
            assert browser.get("/templated/").text == "new template"

            models.write_text(FAILING_CHECK)
            site.expect("the moon is full")
            site.expect("the running code goes on serving")
            assert browser.get("/").text.startswith("old")

            models.write_text("")
            urls.write_text(URLS.replace("old", "brand new"))
            site.expect("System check identified no issues")
            site.expect("Handing over")
            browser.get("/")  # the last answer of the old code on this connection
            assert browser.get("/").text == f"brand new {ORIGIN}/ True"
            assert site.stop() == 0
            assert site.count("DEBUG is True") == 1
            assert SECRET not in site.output


def test_the_asgi_application_of_the_settings_is_served_and_no_static_files_if_unwanted(project: Path) -> None:
    options = ("--local", "--port", "0", "--noreload", "--nostatic", "--skip-checks")
    with runtunnel(project, *options, ASGI_APPLICATION="pages.asgi.app") as site:
        with client(site.url()) as browser:
            page = browser.get("/")
            assert page.headers["x-served-by"] == "pages.asgi"
            assert browser.get("/", headers={"Host": "localhost"}).status_code == 200  # in DEBUG, as with runserver
            assert browser.get("/static/admin/css/base.css").status_code == 404
        assert site.stop() == 0
        assert "system checks" not in site.output
        assert "DEBUG is True" not in site.output


def test_static_files_are_not_served_without_debug(project: Path) -> None:
    with runtunnel(project, "--local", "--port", "0", "--noreload", DEBUG=False) as site:
        with client(site.url()) as browser:
            assert browser.get("/static/admin/css/base.css").status_code == 404
        assert site.stop() == 0


def test_migrations_that_wait_are_told_about(project: Path) -> None:
    (project / "db.sqlite3").unlink()
    with runtunnel(project, "--local", "--port", "0", "--noreload") as site:
        site.expect(r"You have \d+ unapplied migration\(s\)")
        site.url()
        assert site.stop() == 0


def test_apps_beside_the_project_are_watched_too_but_no_installed_ones(project: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "__init__.py").touch()
    options = ("--local", "--port", "0", "--pythonpath", str(tmp_path))
    with runtunnel(project, *options, MORE_APPS=["beside"]) as site:
        watched = site.expect(r"Will watch for changes in these directories: (.*)")[1]
        assert ast.literal_eval(watched) == [str(beside), str(project)]
        site.url()
        assert site.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "settings", "complaint"),
    [
        ((), {"TUNNEL_ASGI": {"sever": "x"}}, r"the setting TUNNEL_ASGI has no option 'sever'; there are domain, .*"),
        ((), {}, "no domain: use --domain .*, or --local to try it without an account"),
        (("--local", "--port", "70000"), {}, "port must be at most 65535"),
        (
            ("--local", "--port", "0", "--noreload", "--settings", "full_moon"),
            {},
            r"SystemCheckError: (?:.*\n)*.*the moon is full",
        ),
        (
            ("--local", "--port", "0", "--noreload"),
            {"ASGI_APPLICATION": "pages.asgi.nothing"},
            'cannot load the app: Attribute "nothing" not found .*',
        ),
    ],
    ids=["unknown option", "no domain", "no such port", "failing check", "no such app"],
)
def test_what_cannot_work_is_one_error_and_exit_code_3(
    project: Path, arguments: tuple[str, ...], settings: dict[str, Any], complaint: str
) -> None:
    (project / "full_moon.py").write_text("from mysite.settings import *\n" + FAILING_CHECK)
    with runtunnel(project, *arguments, **settings) as site:
        assert site.wait() == 3
        assert "Traceback" not in site.output
        assert re.search(f"CommandError: {complaint}", site.text("stderr")), site.output


def test_a_key_on_the_command_line_is_warned_about(project: Path) -> None:
    with runtunnel(project, "--key", SECRET, "--domain", "nonsense") as site:
        site.expect("Warning: --key shows in the process list")
        assert site.wait() == 3
        assert SECRET not in site.output


# Where options come from.

NOTHING = dict.fromkeys(OPTIONS)


def test_the_command_line_comes_before_the_setting() -> None:
    setting = {"domain": "www-a-acme.e0.smallware.io", "standby": 2, "timeout_first_byte": 5, "trust_ca": None}
    assert settle(NOTHING | {"standby": 7}, setting) == {
        "domain": "www-a-acme.e0.smallware.io",
        "standby": 7,
        "timeout_first_byte": 5,
    }


def test_local_on_the_command_line_leaves_the_real_tunnel_of_the_setting_aside() -> None:
    setting = {"domain": "www-a-acme.e0.smallware.io", "server_url": "wss://x", "public_url": "https://y", "port": 0}
    assert settle(NOTHING | {"local": True}, setting) == {"local": True, "port": 0}
    assert settle(NOTHING, setting | {"local": True}) == setting | {"local": True}


def test_a_domain_on_the_command_line_leaves_local_of_the_setting_aside() -> None:
    setting = {"local": True, "port": 9000, "tls": True}
    assert settle(NOTHING | {"domain": "d"}, setting) == {"domain": "d"}
    assert settle(NOTHING, setting) == setting


def test_a_key_file_on_the_command_line_comes_before_a_key_of_the_setting() -> None:
    assert settle(NOTHING | {"key_file": Path("f")}, {"key": "k"}) == {"key_file": Path("f")}


@pytest.mark.parametrize(
    ("given", "setting", "complaint"),
    [
        ({}, ["domain"], "TUNNEL_ASGI must be a dict, not of type list"),
        ({}, {"port": "8000"}, r"TUNNEL_ASGI\['port'\] must be of type int, not str"),
        ({}, {"port": True}, r"TUNNEL_ASGI\['port'\] must be of type int, not bool"),
        ({}, {"local": 1}, r"TUNNEL_ASGI\['local'\] must be of type bool, not int"),
        ({}, {"trust_ca": 1}, r"TUNNEL_ASGI\['trust_ca'\] must be of type Path, not int"),
        ({"port": 0}, {}, "--port goes with --local"),
        ({"tls": True}, {"port": 8000}, "--tls goes with --local"),
    ],
)
def test_options_out_of_form_are_told_by_name(given: dict[str, Any], setting: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        settle(NOTHING | given, setting)


def test_every_option_is_one_of_config() -> None:
    assert set(OPTIONS) <= set(Config.__init__.__kwdefaults__ or ())
