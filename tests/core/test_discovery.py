"""Choosing a store, reading settings, and loading definitions by name."""

import json
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from sagaloom.discovery import discover_service, load_appsettings, resolve_saga_store_backend
from sagaloom.errors import ConfigurationError
from sagaloom.registry import load_definitions, named_modules
from sagaloom.settings import is_loopback, load_settings, refuse_open_door

SAGA = """
from sagaloom import define_saga
def handler(saga, event, context):
    return []
def a_saga(name, kind="Started"):
    return define_saga(name).state({"status": "new"}).on(kind, handler).build()
"""


# --- The store backend -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "backend"), [("kv", "kv"), (" KV ", "kv"), ("sql", "sql"), ("prisma", "sql"), ("Prisma", "sql")]
)
def test_the_environment_chooses_the_backend(value: str, backend: str) -> None:
    assert resolve_saga_store_backend({"NETSCRIPT_SAGA_STORE": value}) == backend


@pytest.mark.parametrize(
    "appsettings",
    [
        {"sagas": {"store": {"backend": "kv"}}},
        {"Sagas": {"Store": {"Backend": "kv"}}},
        {"SagaStore": {"Backend": "KV"}},
        {"SagasStore": {"Backend": "kv"}},
        {"sagas": {"store": {}}, "SagaStore": {"Backend": "kv"}},
    ],
)
def test_appsettings_choose_the_backend_in_any_of_four_spellings(appsettings: dict[str, object]) -> None:
    assert resolve_saga_store_backend({}, appsettings) == "kv"


def test_the_environment_comes_before_appsettings() -> None:
    appsettings = {"sagas": {"store": {"backend": "sql"}}}

    assert resolve_saga_store_backend({"NETSCRIPT_SAGA_STORE": "kv"}, appsettings) == "kv"
    assert resolve_saga_store_backend({"NETSCRIPT_SAGA_STORE": "  "}, appsettings) == "sql"


def test_no_choice_is_refused_with_what_to_set() -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve_saga_store_backend({}, {"sagas": {"store": None}})

    assert (
        caught.value.message
        == "Saga store backend is required. Set NETSCRIPT_SAGA_STORE=kv|sql or appsettings sagas.store.backend."
    )


def test_a_value_that_is_no_backend_is_named_with_its_source() -> None:
    with pytest.raises(ConfigurationError) as from_environment:
        resolve_saga_store_backend({"NETSCRIPT_SAGA_STORE": "redis"})
    with pytest.raises(ConfigurationError) as from_appsettings:
        resolve_saga_store_backend({}, {"SagaStore": {"Backend": 7}})

    assert (
        from_environment.value.message
        == 'Invalid saga store backend "redis" from NETSCRIPT_SAGA_STORE; expected kv or sql.'
    )
    assert (
        from_appsettings.value.message == 'Invalid saga store backend "7" from sagas.store.backend; expected kv or sql.'
    )


def test_appsettings_of_the_environment_lie_over_the_general_ones(tmp_path: Path) -> None:
    (tmp_path / "appsettings.json").write_text('\ufeff{"sagas": {"store": {"backend": "sql"}, "name": "a"}}')
    (tmp_path / "appsettings.Development.json").write_text('{"sagas": {"store": {"backend": "kv"}}}')
    (tmp_path / "appsettings.Test.json").write_text("{}")
    env = {"ASPNETCORE_ENVIRONMENT": "Development", "DOTNET_ENVIRONMENT": "Test"}

    assert load_appsettings(tmp_path, env) == {"sagas": {"store": {"backend": "kv"}, "name": "a"}}
    assert load_appsettings(tmp_path, {"DOTNET_ENVIRONMENT": "Test"})["sagas"]["store"] == {"backend": "sql"}
    assert load_appsettings(tmp_path / "nowhere", {}) == {}


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": 1,}'])
def test_appsettings_that_are_no_json_object_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "appsettings.json").write_text(content)

    with pytest.raises(ConfigurationError, match=r"appsettings\.json cannot be read"):
        load_appsettings(tmp_path, {})


def test_an_environment_name_cannot_leave_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="plain word"):
        load_appsettings(tmp_path, {"DOTNET_ENVIRONMENT": "../secret"})


def test_a_service_is_found_by_mapping_then_https_then_http() -> None:
    env = {"services__a__https__0": "https://a:1", "services__a__http__0": "http://a:2"}

    assert discover_service("a", services={"a": "http://a:3"}, read_env=env.get) == "http://a:3"
    assert discover_service("a", read_env=env.get) == "https://a:1"
    assert discover_service("a", read_env={"services__a__http__0": "http://a:2"}.get) == "http://a:2"
    assert discover_service("b", read_env=env.get) is None
    with pytest.raises(ConfigurationError, match="services__c__http__0"):
        discover_service("c", read_env={"services__c__http__0": "c:80"}.get)


# --- Settings --------------------------------------------------------------------------------------------------------


def test_settings_come_from_the_environment_and_options_come_first() -> None:
    settings = load_settings({"PORT": "9000", "SAGALOOM_TOKEN": "", "NETSCRIPT_SAGA_KV_PATH": "x.db"}, port=9001)

    assert (settings.port, settings.host, settings.token, settings.kv_path) == (9001, "127.0.0.1", None, Path("x.db"))


def test_a_bad_setting_is_named_and_a_token_is_never_shown() -> None:
    with pytest.raises(ConfigurationError, match="port") as caught:
        load_settings({"PORT": "many", "SAGALOOM_TOKEN": "s3cret"})

    assert "s3cret" not in caught.value.message
    assert "s3cret" not in repr(load_settings({"SAGALOOM_TOKEN": "s3cret"}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_token(host: str) -> None:
    refuse_open_door(load_settings({}, host=host), is_insecure=False)

    assert is_loopback(host)


def test_an_open_door_to_the_outside_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"refusing to listen on 0\.0\.0\.0 without a token"):
        refuse_open_door(load_settings({}, host="0.0.0.0"), is_insecure=False)

    refuse_open_door(load_settings({}, host="0.0.0.0", token="t"), is_insecure=False)
    refuse_open_door(load_settings({}, host="0.0.0.0"), is_insecure=True)


# --- Definitions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Generator[Path]:
    """A directory for saga modules, forgotten again by the interpreter afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def ids_in(project: Path, *names: str) -> list[str]:
    return [definition.id for definition in load_definitions(names, env={}, directory=project).definitions]


@pytest.mark.parametrize(
    ("code", "ids"),
    [
        ("sagas = [a_saga('a'), a_saga('b')]\nother = a_saga('c')", ["a", "b"]),
        ("saga_registry = {'x': a_saga('a')}", ["a"]),
        ("registry = (a_saga('a'),)", ["a"]),
        ("definitions = [a_saga('a')]", ["a"]),
        ("default = a_saga('a')", ["a"]),
        ("saga = a_saga('a')\nhelper = a_saga('b')", ["a"]),
        ("definition = a_saga('a')", ["a"]),
        ("one = a_saga('a')\ntwo = a_saga('b')\nagain = one", ["a", "b"]),
    ],
)
def test_what_a_module_exports_is_picked_up(project: Path, code: str, ids: list[str]) -> None:
    (project / "picked.py").write_text(SAGA + code)

    assert ids_in(project, "picked") == ids


def test_a_module_is_named_by_dots_by_attribute_or_by_file(project: Path) -> None:
    (project / "shop").mkdir()
    (project / "shop" / "orders.py").write_text(SAGA + "sagas = [a_saga('a')]\nclass Other:\n    saga = a_saga('b')")
    (project / "single-file.py").write_text(SAGA + "saga = a_saga('c')")

    assert ids_in(project, "shop.orders") == ["a"]
    assert ids_in(project, "shop.orders:Other.saga") == ["b"]
    assert ids_in(project, "single-file.py") == ["c"]
    assert ids_in(project, str(project / "single-file.py")) == ["c"]
    assert ids_in(project, "./single-file.py:saga", "shop.orders") == ["c", "a"]


def test_the_targets_of_a_module_come_along(project: Path) -> None:
    (project / "mailing.py").write_text(
        SAGA + "from sagaloom.targets import callable_target\n"
        "saga = a_saga('a')\ntargets = [callable_target('email', lambda request: None)]"
    )

    assert [target.kind for target in load_definitions(["mailing"], env={}, directory=project).targets] == ["email"]


def test_modules_come_from_arguments_then_the_environment_then_the_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.sagaloom]\nsagas = ["shop.sagas"]')
    env = {"SAGAS_REGISTRY_MODULE": "a.b, c.py"}

    assert named_modules(["x"], env=env, directory=tmp_path) == ("x",)
    assert named_modules(env=env, directory=tmp_path) == ("a.b", "c.py")
    assert named_modules(env={}, directory=tmp_path) == ("shop.sagas",)
    with pytest.raises(ConfigurationError, match="SAGAS_REGISTRY_MODULE"):
        named_modules(env={}, directory=tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("nothing = 1", "must export sagas, saga_registry, registry, definitions, or default"),
        ("sagas = [define_saga('a')]", "contains a non-SagaDefinition entry in sagas"),
        ("sagas = 7", "sagas must be a saga definition, or a list or mapping of them, got int"),
        ("sagas = []", "sagas is empty"),
        ("import no_such_module_anywhere", "needs a module that is missing"),
        ("raise RuntimeError('boom')", "cannot be loaded: RuntimeError: boom"),
        ("saga = a_saga('a')\ntargets = [7]", "no kind, deliver and close"),
        ("saga = a_saga('a')\ntargets = 7", "targets must be a list"),
    ],
)
def test_a_module_that_is_no_registry_says_why(project: Path, code: str, message: str) -> None:
    (project / "broken.py").write_text(SAGA + code)

    with pytest.raises(ConfigurationError, match=message) as caught:
        ids_in(project, "broken")

    assert "broken" in caught.value.message


@pytest.mark.parametrize("name", ["nowhere", "nowhere.at.all", "nowhere.py", "shop:nothing"])
def test_a_module_that_is_not_there_is_named(project: Path, name: str) -> None:
    (project / "shop.py").write_text(SAGA + "saga = a_saga('a')")

    with pytest.raises(ConfigurationError, match=r"nowhere|nothing"):
        ids_in(project, name)


def test_one_saga_from_two_modules_counts_once_and_two_of_one_name_are_refused(project: Path) -> None:
    (project / "one.py").write_text(SAGA + "saga = a_saga('a')")
    (project / "same.py").write_text("from one import saga")
    (project / "other.py").write_text(SAGA + "saga = a_saga('a', 'Stopped')")

    assert ids_in(project, "one", "same") == ["a"]
    with pytest.raises(ConfigurationError, match="two different sagas have the id 'a'"):
        ids_in(project, "one", "other")


def test_a_bad_list_in_the_project_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[tool.sagaloom]\nsagas = {json.dumps([1])}")

    with pytest.raises(ConfigurationError, match="must be a list of module names"):
        named_modules(env={}, directory=tmp_path)


CONFIG = """
from sagaloom.config import define_saga_config, define_saga_group
"""


@pytest.mark.parametrize("entrypoint", ["shop.orders", "shop.orders:saga", "shop/orders.py", "./shop/orders.py:saga"])
def test_an_entry_brings_its_saga_along_and_has_it_run_as_it_says(project: Path, entrypoint: str) -> None:
    (project / "shop").mkdir()
    (project / "shop" / "orders.py").write_text(SAGA + "saga = a_saga('a')")
    (project / "config.py").write_text(
        CONFIG + f"entry = define_saga_config('a', {entrypoint!r}).name('A saga').topic('orders').retry(1).build()"
    )

    (saga,) = load_definitions(["config"], env={}, directory=project).definitions

    assert (saga.id, saga.about.name, saga.about.topic, saga.about.entrypoint) == ("a", "A saga", "orders", entrypoint)
    assert saga.retry.maximum_attempts == 2


@pytest.mark.parametrize(
    "code",
    [
        "entry = define_saga_config('a', 'x').build()\ngroup = define_saga_group('orders', entry)",
        "group = [define_saga_group('orders', define_saga_config('a', 'x').build())]",
        "sagas = [define_saga_group('orders', define_saga_config('a', 'x').build()), a_saga('b')]",
        "definitions = (define_saga_config('a', 'x').topic('orders').build(),)",
    ],
)
def test_entries_stand_alone_in_groups_or_among_sagas(project: Path, code: str) -> None:
    (project / "x.py").write_text(SAGA + "saga = a_saga('a')")
    (project / "config.py").write_text(SAGA + CONFIG + code)

    found = {one.id: one.about.topic for one in load_definitions(["config"], env={}, directory=project).definitions}

    assert found.pop("b", "default") == "default"
    assert found == {"a": "orders"}


def test_an_entry_is_about_a_saga_of_another_module_that_is_named_too(project: Path) -> None:
    (project / "orders.py").write_text(SAGA + "saga = a_saga('a')")
    (project / "config.py").write_text(CONFIG + "entry = define_saga_config('a', 'orders').disabled().build()")

    for names in (["orders", "config"], ["config", "orders"]):
        (saga,) = load_definitions(names, env={}, directory=project).definitions

        assert not saga.about.enabled


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("entry = define_saga_config('b', 'orders').build()", "entrypoint orders has no such saga: it has a"),
        ("entry = define_saga_config('a', 'nowhere').build()", "nowhere was not found"),
        ("entry = define_saga_config('a', 'orders')", r"finish it with \.build\(\)"),
        (
            "one = define_saga_config('a', 'orders').build()\ntwo = define_saga_config('a', 'other').build()",
            "two configurations for saga 'a'",
        ),
    ],
)
def test_an_entry_that_leads_nowhere_says_so(project: Path, code: str, message: str) -> None:
    (project / "orders.py").write_text(SAGA + "saga = a_saga('a')")
    (project / "config.py").write_text(CONFIG + code)

    with pytest.raises(ConfigurationError, match=message):
        load_definitions(["config"], env={}, directory=project)
