"""The model card beside the adapter: README.md with the front matter that the Hugging Face hub reads."""

import re
from pathlib import Path
from typing import Any

import yaml

from rankrace.report import text
from rankrace.report.figures import measured
from rankrace.result import Result, replace_text


def write_card(result: Result, config: dict[str, Any], path: Path) -> None:
    """Write the card to `path`, inside the adapter's folder. `config` is the run's resolved configuration."""
    replace_text(path, render_card(result, config))


def render_card(result: Result, config: dict[str, Any]) -> str:
    """The card as Markdown. It names no licence: that is the base model's and the data's to give."""
    # Markdown is no HTML to escape: what others wrote goes through `prose` or into a code block.
    environment = text.templates(autoescape=False)
    environment.filters["prose"] = prose
    front_matter = {
        "base_model": result.model,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation" if result.task == "causal" else "text-classification",
        "tags": ["lora", "peft", "rankrace"],
    }
    folder = "path/to/this/folder"
    return environment.get_template("card.md.j2").render(
        result=result,
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True),
        unit=text.loss_unit(result),
        curve=measured(result.curve),
        r16_share=text.r16_share(result),
        interval=text.interval(result.decision.interval),
        delivered=text.delivered(result),
        warnings=text.warnings(result),
        loading=text.loading_code(result, folder),
        vllm=text.vllm_command(result, folder),
        lora_config=text.lora_config_code(result, config),
    )


def prose(words: str) -> str:
    """The words with everything escaped that Markdown or HTML would read as markup, on one line."""
    words = " ".join(words.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", words)
