"""What diffusers gives its schedulers, for where it is not installed: all of it but the hub.

Configurations that these write are read by diffusers and lead to the same scheduler there, and the reverse.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

CONFIG_NAME = "scheduler_config.json"
FORMAT = "0.42.1"  # the version of diffusers whose format is written


class FrozenDict(dict):
    """A configuration: keys that are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class BaseOutput(OrderedDict):
    """A result: its keys are attributes, too, and by a number or a slice it is a tuple."""

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.__dict__[name] = value

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


def register_to_config(init):
    """Decorate a constructor: its arguments become the object's config, with the names of those that nobody gave."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def registering(self, *args, **kwargs):
        hidden = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("_")}
        bound = signature.bind(self, *args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        _, *arguments = bound.arguments.items()
        defaults = [name for name, _ in arguments if name not in given]
        self.register_to_config(**hidden, **dict(arguments), _use_default_values=defaults)
        init(self, *args, **kwargs)

    return registering


class ConfigMixin:
    config_name = CONFIG_NAME
    has_compatibles = True
    _internal_dict: FrozenDict

    def register_to_config(self, **kwargs) -> None:
        """Change the config, as if the scheduler had been made with these."""
        self._internal_dict = FrozenDict({**vars(self).get("_internal_dict", {}), **kwargs})

    @property
    def config(self) -> Any:
        return self._internal_dict

    def __getattr__(self, name: str) -> Any:
        config = vars(self).get("_internal_dict", {})
        if name not in config:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return config[name]

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """A scheduler from the config of any; what it does not know stays in the config for the next class."""
        if not isinstance(config, dict):
            config = cls.load_config(config)
        defaults = {*config.get("_use_default_values", ()), "_use_default_values"}
        chosen = {name: value for name, value in config.items() if name not in defaults}
        known = set(inspect.signature(cls).parameters)
        given = {name: value for name, value in (chosen | kwargs).items() if name in known}
        hidden = {name: value for name, value in chosen.items() if name not in known}
        if "_class_name" in hidden:
            hidden["_class_name"] = cls.__name__
        scheduler = cls(**given)
        scheduler.register_to_config(**hidden)
        unused = {name: value for name, value in kwargs.items() if name not in known} | hidden
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path,
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        subfolder: str | None = None,
        **kwargs,
    ):
        """The config in a file, a folder, or a subfolder of it, such as "scheduler" of a pipeline's."""
        path = Path(str(pretrained_model_name_or_path))
        places = [path, path / (subfolder or "") / cls.config_name, path / cls.config_name]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"pretrained_model_name_or_path: expected a folder with {cls.config_name}, got {path}"
                " (the hub is read where diffusers is installed)"
            )
        try:
            config = json.loads(found.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"pretrained_model_name_or_path: {found} is not a JSON file: {error}") from None
        result = (config, *([kwargs] * return_unused_kwargs), *([None] * return_commit_hash))
        return result if len(result) > 1 else config

    get_config_dict = load_config

    def to_json_string(self) -> str:
        config = {name: value for name, value in self.config.items() if name != "_use_default_values"}
        config |= {"_class_name": type(self).__name__, "_diffusers_version": FORMAT}
        return json.dumps(config, indent=2, sort_keys=True, default=_saveable) + "\n"

    def to_json_file(self, json_file_path) -> None:
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        if push_to_hub:
            raise NotImplementedError("push_to_hub: expected False where diffusers is not installed")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / self.config_name)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _saveable(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"config: {type(value).__name__} cannot be saved as JSON")


class SchedulerMixin:
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs,
    ):
        """A scheduler from a folder or file that `save_pretrained` wrote, ours or diffusers', or a pipeline's."""
        config = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder)  # type: ignore[attr-defined]
        return cls.from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write scheduler_config.json, which diffusers reads too, into `save_directory`."""
        self.save_config(save_directory, push_to_hub, **kwargs)  # type: ignore[attr-defined]

    @property
    def compatibles(self) -> list[type]:
        return self._get_compatibles()

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return []
