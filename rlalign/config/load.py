"""YAML and dotlist overrides to a checked `Config`: unknown keys, wrong types and values out of
range are errors."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlalign.config.schema import Config
from rlalign.errors import RlalignError


class ConfigError(RlalignError, ValueError):
    """The configuration is wrong; the message names the key, the value and what is allowed."""


T = TypeVar("T")


def parse_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a run's YAML file (or a mapping), apply `key=value` overrides, check everything; errors
    as in `parse`."""
    return parse(Config, source, overrides)


def parse(
    kind: type[T], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> T:
    """The structured config `kind` from a YAML file (or a mapping) and `key=value` overrides.

    A file may start from another one: `extends: ../grpo/mini.yaml`, relative to its own folder.

    Raises ConfigError for a missing file, malformed YAML, an unknown key (with the nearest valid
    name), a wrong type, a value out of range, or a required key left out.
    """
    files = _read_files(Path(source)) if isinstance(source, (str, Path)) else [dict(source)]
    merged = OmegaConf.structured(kind)
    for layer in (*files, *_read_overrides(overrides)):
        _check_keys(layer, kind, kind)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise _type_error(error, kind) from error
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            doc = "; ".join(f"{key}: {_doc(key, kind)}" for key in missing)
            raise ConfigError(f"required keys are not set: {', '.join(missing)}. {doc}")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # `${...}` that refers to nothing
        raise _type_error(error, kind) from error
    assert isinstance(config, kind)
    check_values(config)
    return config


def check_values(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first value outside its range or choices."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_values(value, key + ".")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    check_values(item, f"{key}[{i}].")
        elif value is not None:
            _check_value(key, value, field.metadata)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_files(path: Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The file and all it extends, the farthest first."""
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself by way of {', '.join(map(str, seen))}")
    raw = _read_yaml(path)
    base = raw.pop("extends", None)
    if base is None:
        return [raw]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends is {base!r}; it names one file, relative to this one")
    return [*_read_files(path.parent / base, (*seen, path.resolve())), raw]


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" In that folder: {', '.join(near)}." if near else ""
        raise ConfigError(f"no config file at {path}.{hint}")
    try:  # OmegaConf's reader: a key given twice is an error, and 1e-6 is a number
        raw: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, not a mapping of sections")
    return raw


def _read_overrides(overrides: Sequence[str]) -> list[dict[str, Any]]:
    layers = []
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"override {item!r} is not of the form key=value, e.g. trainer.max_steps=20"
            )
        if "[" in key:
            raise ConfigError(
                f"override {item!r}: lists are set whole, e.g. 'rewards.functions=[{{name: math}}]'"
            )
        try:
            layers.append(OmegaConf.to_container(OmegaConf.from_dotlist([item])))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"override {item!r} cannot be read: {error}") from error
    return layers


def _check_keys(raw: Any, kind: type, root: type, prefix: str = "") -> None:
    """Unknown keys are named with their nearest valid neighbour before OmegaConf sees them."""
    if not isinstance(raw, Mapping):
        place = prefix.rstrip(".") or "the config"
        raise ConfigError(f"{place} is {raw!r}; expected a mapping of {kind.__name__} keys")
    hints = typing.get_type_hints(kind)
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise ConfigError(_unknown_key(key, str(name), kind, root, prefix))
        inner = hints[name]
        if dataclasses.is_dataclass(inner):
            _check_keys(value, inner, root, key + ".")  # type: ignore[arg-type]
        elif typing.get_origin(inner) is list and isinstance(value, (list, ListConfig)):
            element = typing.get_args(inner)[0]
            if dataclasses.is_dataclass(element):
                for i, item in enumerate(value):
                    _check_keys(item, element, root, f"{key}[{i}].")  # type: ignore[arg-type]


def _unknown_key(key: str, name: str, kind: type, root: type, prefix: str) -> str:
    local = [prefix + f.name for f in dataclasses.fields(kind)]
    near = difflib.get_close_matches(prefix + name, local, n=1, cutoff=0.75)
    if not near:  # perhaps the right name in the wrong section
        near = [k for k in all_keys(root) if k.rsplit(".", 1)[-1] == name]
    if not near:
        others = [other for other in all_keys(root) if not key.startswith(f"{other}.")]
        near = difflib.get_close_matches(key, others, n=1)
    if near == [key]:  # a dot in a mapping's key
        section, _, rest = key.partition(".")
        return (
            f"unknown config key {key!r}; sections are mappings: {{{section!r}: {{{rest!r}: ...}}}}"
        )
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(local)}."
    return f"unknown config key {key!r}; {hint}"


def all_keys(kind: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, leaves and sections."""
    for name, inner in typing.get_type_hints(kind).items():
        yield prefix + name
        if dataclasses.is_dataclass(inner):
            yield from all_keys(inner, f"{prefix}{name}.")  # type: ignore[arg-type]


def _field(key: str, root: type) -> dataclasses.Field | None:
    kind: Any = root
    field = None
    for part in key.split("."):
        name = part.split("[")[0]
        if not dataclasses.is_dataclass(kind) or name not in (hints := typing.get_type_hints(kind)):
            return None
        field = next(f for f in dataclasses.fields(kind) if f.name == name)
        kind = hints[name]
        if typing.get_origin(kind) is list:
            kind = typing.get_args(kind)[0]
    return field


def _doc(key: str, root: type) -> str:
    field = _field(key, root)
    return field.metadata.get("doc", "") if field else ""


def _type_error(error: OmegaConfBaseException, root: type) -> ConfigError:
    key = error.full_key or "?"
    field = _field(key, root)
    expected = f" expected {field.type}: {field.metadata.get('doc', '')}" if field else ""
    cause = str(error).splitlines()[0]
    return ConfigError(f"config key {key!r}: {cause};{expected}")


def _check_value(key: str, value: Any, rules: Mapping[str, Any]) -> None:
    if "choices" in rules and value not in rules["choices"]:
        near = difflib.get_close_matches(str(value), rules["choices"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key} = {value!r}; allowed: {', '.join(rules['choices'])}{hint}")
    bounds = [(">=", "ge"), ("<=", "le"), (">", "gt")]
    wanted = " and ".join(f"{sign} {rules[name]}" for sign, name in bounds if name in rules)
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = numeric and (
        value >= rules.get("ge", value)
        and value <= rules.get("le", value)
        and ("gt" not in rules or value > rules["gt"])
    )
    if wanted and not inside:
        raise ConfigError(f"{key} = {value!r}; allowed: {wanted}. {rules['doc']}")
