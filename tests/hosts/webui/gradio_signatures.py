"""The parameters of the components the extension uses, by the version of Gradio that the hosts pin, and a stand-in
for Gradio that takes no others. Positional order counts."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

SIGNATURES: dict[str, dict[str, str]] = {
    "3.41.2": {
        "Row": "variant visible elem_id equal_height",
        "Radio": (
            "choices value type label info every show_label container scale min_width interactive "
            "visible elem_id elem_classes"),
        "Slider": (
            "minimum maximum value step label info every show_label container scale min_width "
            "interactive visible elem_id elem_classes randomize"),
        "Checkbox": (
            "value label info every show_label container scale min_width interactive visible "
            "elem_id elem_classes"),
        "Button": (
            "value variant size icon link visible interactive elem_id elem_classes scale "
            "min_width"),
        "HTML": "value label every show_label visible elem_id elem_classes",
        "Dropdown": (
            "choices value type multiselect allow_custom_value max_choices label info every "
            "show_label container scale min_width interactive visible elem_id elem_classes"),
        "Textbox": (
            "value lines max_lines placeholder label info every show_label container scale "
            "min_width interactive visible elem_id autofocus elem_classes type text_align rtl "
            "show_copy_button"),
    },
    "4.40.0": {
        "Row": "variant visible elem_id elem_classes render equal_height show_progress",
        "Radio": (
            "choices value type label info every inputs show_label container scale min_width "
            "interactive visible elem_id elem_classes render key"),
        "Slider": (
            "minimum maximum value step label info every inputs show_label container scale "
            "min_width interactive visible elem_id elem_classes render key randomize"),
        "Checkbox": (
            "value label info every inputs show_label container scale min_width interactive "
            "visible elem_id elem_classes render key"),
        "Button": (
            "value every inputs variant size icon link visible interactive elem_id elem_classes "
            "render key scale min_width"),
        "HTML": "value label every inputs show_label visible elem_id elem_classes render key",
        "Dropdown": (
            "choices value type multiselect allow_custom_value max_choices filterable label "
            "info every inputs show_label container scale min_width interactive visible elem_id "
            "elem_classes render key"),
        "Textbox": (
            "value lines max_lines placeholder label info every inputs show_label container "
            "scale min_width interactive visible elem_id autofocus autoscroll elem_classes "
            "render key type text_align rtl show_copy_button"),
    },
}


class Component:
    """Remembers what it was made with; refuses what this version of Gradio does not know."""

    version, made = "", []  # type: ignore[var-annotated]

    def __init__(self, *args: Any, **named: Any):
        known = SIGNATURES[self.version][type(self).__name__].split()
        given = dict(zip(known, args))
        assert len(args) <= len(known), (type(self).__name__, args)
        unknown = [name for name in named if name not in known or name in given]
        assert not unknown, f"Gradio {self.version}: {type(self).__name__} has no {unknown}"
        self.__dict__.update(given | named)
        self.clicks: list[Any] = []
        self.made.append(self)

    def __enter__(self) -> Component:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def click(self, fn: Any = None, inputs: Any = None, outputs: Any = None) -> None:
        self.clicks.append(fn)


class InputAccordion:
    """Of the hosts, not of Gradio: a check box that is an accordion."""

    def __init__(self, value: bool = False, *, label: str, elem_id: str):
        self.value, self.label, self.elem_id = value, label, elem_id

    def __enter__(self) -> InputAccordion:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def module(version: str) -> ModuleType:
    """A ``gradio`` of this version; ``made`` lists all components made with it."""
    gradio = ModuleType("gradio")
    made: list[Component] = []
    for name in SIGNATURES[version]:
        setattr(gradio, name, type(name, (Component,), {"version": version, "made": made}))
    gradio.update = lambda **named: SimpleNamespace(**named)  # type: ignore[attr-defined]
    gradio.made = made  # type: ignore[attr-defined]
    return gradio
