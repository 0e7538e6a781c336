"""An adapter's card as a model card: base, data, scores, decision, limits and how to load it.

Every figure comes from the card. What was not measured is said under limits. The front matter names the base where it
came from the Hub, because the Hub takes nothing but its own ids there (huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
from typing import Any

from tunegate.model.resolve import HUB_ID
from tunegate.registry.publish.published import Published

_FAMILIES = {"regression": "the base's abilities", "safety": "the base's refusals"}


def model_card(item: Published, repo: str) -> str:
    """Markdown with the Hub's front matter."""
    version, base, card = item.version, item.provenance["base"], item.card
    on_hub = (card is None or card["base"].get("source") == "hub") and bool(HUB_ID.fullmatch(str(base["name"])))
    front = {"library_name": "peft", **({"base_model": base["name"]} if on_hub else {}), "tags": ["lora", "tunegate"]}
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    parts = [f"---\n{head}\n---", f"# {version.ref}", f"State: **{version.standing}**.", _base(base)]
    if card is None:
        parts.append(
            "## Limits\n\nUnverified: it came without a card. What it was trained on and how it scores is not known."
        )
    else:
        parts += [_data(card), _scores(card), _decision(item, card), _limits(card)]
    parts += [_loading(base, repo, on_hub), f"Content hash `{version.adapter}`. `card.json` holds the whole record."]
    return "\n\n".join(parts) + "\n"


def _base(base: dict[str, Any]) -> str:
    recipe = "in full precision" if not base["recipe"] else f"quantized ({json.dumps(base['recipe'], sort_keys=True)})"
    known = f"fingerprint `{base['fingerprint']}`, {recipe}" if base["fingerprint"] else "claimed, not proven"
    return f"## Base\n\n`{base['name']}`, {known}. On another base the adapter computes nonsense."


def _data(card: dict[str, Any]) -> str:
    rows = ", ".join(f"{name} {n:,}" for name, n in (card["data"].get("rows") or {}).items())
    files = "\n".join(f"- `{name}` `{digest}`" for name, digest in card["data"]["files"].items())
    return f"## Data\n\nRows: {rows}. Test set `{card['data']['test']}`.\n\n{files}"


def _scores(card: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {e['subject']} | {e['split']} | {name} | {s['value']:.4f} | {s['low']:.3f} to {s['high']:.3f} | {s['n']} |"
        for e in card["evaluations"]
        for name, s in e["scores"].items()
    )
    head = "| subject | split | metric | score | interval | items |\n| --- | --- | --- | --- | --- | --- |"
    return f"## Scores\n\n{head}\n{rows}"


def _decision(item: Published, card: dict[str, Any]) -> str:
    rules = "\n".join(f"- {r['rule']}: {r['verdict']}. {r['reason']}" for r in card["decision"]["rules"])
    override = item.version.override
    against = f"\n\n**Approved against the gate**: {override}" if override else ""
    verdict = card["decision"]["verdict"]
    return f"## Decision\n\nThe gate says **{verdict}**, by thresholds set before training.\n\n{rules}{against}"


def _limits(card: dict[str, Any]) -> str:
    judged = {(rule.get("metric") or "").partition(".")[0] for rule in card["decision"]["rules"]}
    lines = [
        f"- Not judged: whether {what} are as they were." for family, what in _FAMILIES.items() if family not in judged
    ]
    asked = card["evaluations"][0]
    items = asked["scores"][asked["primary"]]["n"]
    lines.append(f"- Scores hold for {items} test items like the training data; elsewhere nothing was measured.")
    if len(card["test_openings"]) > 1:
        lines.append(f"- The test set was opened {len(card['test_openings'])} times.")
    lines.append("- The licence follows from the base's and the data's; it is not recorded here.")
    return "## Limits\n\n" + "\n".join(lines)


def _loading(base: dict[str, Any], repo: str, on_hub: bool) -> str:
    name, place = json.dumps(base["name"]), json.dumps(repo)
    local = "" if on_hub else f"{name} is the base's name where the adapter was made: put in yours.\n\n"
    return f"""## How to load

{local}```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({name})
model = PeftModel.from_pretrained(base, {place})
tokenizer = AutoTokenizer.from_pretrained({name})
```"""
