"""For tests of the engine's faces: a tiny model with a tokenizer, and few step shapes."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tiny_models import CASES, make_checkpoint

CASE = "llama3"

SHAPES = {
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "num_pages": 40,
    "page_size": 8,
    "batch_buckets": (4,),
    "token_buckets": (32,),
    "context_buckets": (64,),
    "compilation_cache_dir": "",
    "show_progress": False,
}
"""Engine arguments that make three step shapes to compile."""

OPTIONS = [
    part
    for name, value in SHAPES.items()
    if name != "show_progress"
    for part in (
        "--" + name.replace("_", "-"),
        *map(str, value if isinstance(value, tuple) else (value,)),
    )
] + ["--no-show-progress"]
"""The same on a command line."""

_TEXT = """the cat sat on the mat and saw a bird. it was a bright day, said she; call me Ishmael!
Every serving system keeps pages of keys and values while requests wait their turn, although nobody
looks behind those curtains. Quietly, a scheduler chooses which prompts shall be answered first:
fairness matters, throughput matters more, and latency annoys everyone. Zebras judge explicitly?
"No," whispered Elizabeth Bennet, "unless memory overflows, kernels never quarrel about bandwidth."
"""
_TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"


def make_model(folder: Path) -> Path:
    """Writes a model folder whose tokenizer knows the characters of a few words."""
    make_checkpoint(CASE, folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CASES[CASE]["vocab_size"],
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    # The model's random tokens all have a text.
    assert tokenizer.get_vocab_size() == CASES[CASE]["vocab_size"]
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
