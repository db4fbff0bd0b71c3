"""Train the three models of the embedded team on generated data, and write them with their model cards.

    python scripts/train_embedded.py                   train all three, one after another
    python scripts/train_embedded.py planner           train one of them
    python scripts/train_embedded.py --measure         measure the written models on held-out examples, without training

Examples are drawn from a seed as training needs them. Training never uses those that `sampling.is_held_out` reserves.
The script writes a checkpoint every 500 steps. An interrupted run resumes from it and draws new examples.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agents.arithmetic import oracle, sampling, scratchpad, wording
from agents.arithmetic.expressions import APPLY, NUMBER_NAMES, OPERAND_MAX, STEP_NAMES

PAD, BOS, EOS, REPLY = "<pad>", "<s>", "</s>", "<reply>"
BUCKET_TOKENS = 16
"""The length of a batch is a multiple of this."""
IGNORED = -100
"""The target of tokens that have no loss: those of the prompt and padding."""
AT_ONCE_SHARE = 0.1
"""The share of the solver's examples that are whole problems."""

Example = tuple[str, list[str]]
"""A prompt in the role's format, and the tokens of its reply."""


def planner_example(rng: random.Random, held_out: bool) -> Example:
    while True:
        problem = sampling.draw_problem(rng)
        if sampling.is_held_out(problem.text) == held_out:
            prompt = scratchpad.plan_prompt(problem.text)
            return prompt, scratchpad.plan_reply(oracle.plan(prompt))


def draw_step(rng: random.Random, held_out: bool) -> tuple[int, str, int]:
    """Draw a step. Half of the training steps are products, the hardest to learn; held-out steps are not selected."""
    product = None if held_out else rng.random() < 0.5
    while True:
        step = sampling.draw_step(rng)
        if product is not None and product != (step[1] == "*"):
            continue
        if sampling.is_held_out(scratchpad.step_prompt(*step)) == held_out:
            return step


def step_example(rng: random.Random, held_out: bool) -> Example:
    step = draw_step(rng, held_out)
    return scratchpad.step_prompt(*step), scratchpad.worked_step(*step)


def at_once_example(rng: random.Random, held_out: bool) -> Example:
    while True:
        problem = sampling.draw_problem(rng)
        if sampling.is_held_out(problem.text) == held_out:
            return scratchpad.at_once_prompt(problem.text), scratchpad.at_once_reply(problem.expression.value)


def solver_example(rng: random.Random, held_out: bool) -> Example:
    """Draw a step, or in a tenth of the cases a whole problem.

    The team is compared with the solver's answer without steps, so the solver must learn to give one.
    """
    return (at_once_example if rng.random() < AT_ONCE_SHARE else step_example)(rng, held_out)


def claim_example(rng: random.Random, held_out: bool, right: bool) -> Example:
    left, sign, operand = step = draw_step(rng, held_out)
    result = APPLY[sign](left, operand) if right else sampling.draw_wrong_result(rng, *step)
    return scratchpad.claim_prompt(*step, result), scratchpad.worked_check(*step, result)


def critic_example(rng: random.Random, held_out: bool) -> Example:
    return claim_example(rng, held_out, right=rng.random() < 0.5)


@dataclass(frozen=True)
class Recipe:
    """One model: its size, its training, the numbers in its vocabulary, its examples, and the figures on its card.

    `figures` maps the name of a figure to the held-out examples that it is measured on.
    """

    hidden: int
    layers: int
    intermediate: int
    steps: int
    batch: int
    learning_rate: float
    max_tokens: int
    numbers: tuple[str, ...]
    example: Callable[[random.Random, bool], Example]
    figures: dict[str, Callable[[random.Random, bool], Example]]


NAMED = tuple(NUMBER_NAMES)
WRITTEN = tuple(str(n) for n in range(OPERAND_MAX + 1))
RECIPES = {
    "planner": Recipe(
        160, 4, 512, 9_000, 64, 2e-3, 128, NAMED, planner_example, {"plans exact": planner_example}
    ),
    "solver": Recipe(
        160, 4, 448, 10_000, 64, 2e-3, 96, WRITTEN, solver_example,
        {"steps exact": step_example, "whole problems at once, without steps": at_once_example},
    ),
    "critic": Recipe(
        128, 4, 384, 9_000, 64, 2e-3, 96, WRITTEN, critic_example,
        {
            "right results accepted": partial(claim_example, right=True),
            "wrong results rejected": partial(claim_example, right=False),
        },
    ),
}  # fmt: skip


def build_tokenizer(numbers: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word of the grammar, number, sign and step name.

    Its chat template makes the last message the prompt.
    """
    signs = ["+", "-", "*", "(", ")", "=", "<", ">", ".", ",", "?", "!", ";"]
    names = [form for name in STEP_NAMES for form in (name, f"{name}=", f";{name}=")]
    words = sorted(wording.vocabulary() | {scratchpad.RIGHT, scratchpad.WRONG})
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, REPLY, *signs, *names, *numbers, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]+|."), behavior="isolated")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=[REPLY]
    )
    fast.chat_template = (
        "{{ bos_token }}{{ messages[-1]['content'] }}{% if add_generation_prompt %}" + REPLY + "{% endif %}"
    )
    return fast


class Encoder:
    """An encoder of examples as token ids: prompts as the chat template does, replies by looking up each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.get_vocab()

    def prompt(self, text: str) -> list[int]:
        return [
            self.vocabulary[BOS],
            *self.tokenizer(text, add_special_tokens=False)["input_ids"],
            self.vocabulary[REPLY],
        ]

    def reply(self, tokens: list[str]) -> list[int]:
        return [*(self.vocabulary[token] for token in tokens), self.vocabulary[EOS]]


def batches(encoder: Encoder, recipe: Recipe, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of examples of similar length, without end: inputs and targets, both [batch, length].

    The length is a multiple of BUCKET_TOKENS.
    """
    batches_at_once = 16
    while True:
        rows = []
        for _ in range(batches_at_once * recipe.batch):
            prompt, reply = recipe.example(rng, False)
            ids, answer = encoder.prompt(prompt), encoder.reply(reply)
            rows.append((ids + answer, len(ids)))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[i * recipe.batch : (i + 1) * recipe.batch] for i in range(batches_at_once)]
        rng.shuffle(groups)
        for group in groups:
            length = -(-max(len(ids) - 1 for ids, _ in group) // BUCKET_TOKENS) * BUCKET_TOKENS
            inputs = torch.zeros(recipe.batch, length, dtype=torch.long)
            targets = torch.full((recipe.batch, length), IGNORED)
            for row, (ids, start) in enumerate(group):
                inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
                targets[row, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
            yield inputs, targets


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    heads = recipe.hidden // 32  # 32 is the smallest head size of vLLM's CPU attention
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=recipe.max_tokens,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(name: str, recipe: Recipe, work: Path, seed: int, compiled: bool) -> LlamaForCausalLM:
    """Train for the recipe's number of steps, from the checkpoint in `work` if there is one, and return the model."""
    torch.manual_seed(seed)
    encoder = Encoder(build_tokenizer(recipe.numbers))
    model = build_model(recipe, encoder.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    checkpoint = work / f"{name}.pt"
    first = restore(checkpoint, model, optimizer, seed)
    backbone = torch.compile(model.model, dynamic=False) if compiled else model.model
    started = time.monotonic()
    # A resumed run needs another seed. The same seed would draw the same examples again.
    stream = batches(encoder, recipe, random.Random(f"{name}/{seed}/{first}"))
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, recipe.steps)
        inputs, targets = next(stream)
        hidden = backbone(input_ids=inputs, use_cache=False).last_hidden_state
        kept = targets != IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), targets[kept])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step + 1 == recipe.steps:
            left_s = (recipe.steps - step - 1) * (time.monotonic() - started) / (step - first + 1)
            print(
                f"\r{name}: step {step + 1}/{recipe.steps}, loss {loss.item():.5f}, {left_s / 60:.0f} min left ", end=""
            )
            sys.stdout.flush()
        if step % 500 == 499:
            save(checkpoint, model, optimizer, step + 1, seed)
    save(checkpoint, model, optimizer, recipe.steps, seed)
    print()
    return model


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear warm-up over 200 steps, then a cosine to zero."""
    return min(step / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def save(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int, seed: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seed": seed}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def restore(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, seed: int) -> int:
    """Load the checkpoint if there is one, and return the next step. Exits if its seed is another one."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["seed"] != seed:
        raise SystemExit(f"{path} has seed {state['seed']}, not {seed}: remove it to start again, or use its seed")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def measure(folder: Path, recipe: Recipe, count: int) -> dict[str, float]:
    """Return the share of held-out examples that the written model answers exactly, by figure. Decoding is greedy."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = Encoder(tokenizer)
    figures = {}
    for figure, example in recipe.figures.items():
        rng = random.Random(f"held-out {figure}")
        examples = sorted((example(rng, True) for _ in range(count)), key=lambda e: len(encoder.prompt(e[0])))
        verdict = {"accepted": scratchpad.RIGHT, "rejected": scratchpad.WRONG}.get(figure.split()[-1])
        exact = 0
        for start in range(0, count, 250):
            part = examples[start : start + 250]
            replies = generate(model, tokenizer, [encoder.prompt(prompt) for prompt, _ in part], recipe.max_tokens)
            for (_, wanted), reply in zip(part, replies, strict=True):
                # A verdict is compared with the truth, because the worked check may err; other replies must match.
                exact += reply[-2:] == encoder.reply([verdict]) if verdict else reply == encoder.reply(wanted)
            print(f"\r{figure}: {exact}/{start + len(part)} ", end="")
            sys.stdout.flush()
        print()
        figures[figure] = exact / count
    return figures


@torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not analysed: see pyproject.toml
def generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """Return the greedy replies, each up to and including its end token. Prompts are padded on the left."""
    width = max(map(len, prompts))
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_length=width + max_tokens, pad_token_id=pad
    )
    replies = out[:, width:].tolist()
    return [reply[: reply.index(eos) + 1] if eos in reply else reply for reply in replies]


def write(model: LlamaForCausalLM, recipe: Recipe, folder: Path) -> None:
    """Write the weights as bfloat16 safetensors, the configuration and the tokenizer. Replaces each file atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        model.to(torch.bfloat16).save_pretrained(fresh)
        build_tokenizer(recipe.numbers).save_pretrained(fresh)
        for file in Path(fresh).iterdir():
            if file.name != "generation_config.json":
                file.chmod(0o644)
                file.replace(folder / file.name)


def write_card(name: str, recipe: Recipe, folder: Path, figures: dict[str, float], count: int, seed: int) -> None:
    """Write the model card, with the share of `count` held-out examples for each figure."""
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    rows = "\n".join(f"| {figure} | {share:.2%} |" for figure, share in figures.items())
    (folder / "README.md").write_text(
        f"""# The embedded team's {name}

A Llama-architecture model of {recipe.layers} layers and {recipe.hidden} dimensions ({size / 1e6:.1f} MB as bfloat16),
trained on integer arithmetic only. `agents/arithmetic` defines the bounds of its problems and its notation.

    python scripts/train_embedded.py {name} --seed {seed}

{recipe.steps:,} steps of {recipe.batch} generated examples, none of them held out.

| share of {count:,} held-out examples, greedy decoding | |
|---|---|
{rows}
"""
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="planner, solver or critic (default: all three)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and examples (default: 0)")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the recipe)")
    parser.add_argument("--threads", type=int, default=0, help="processor threads (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "configs" / "models", help="folder for the models")
    parser.add_argument("--work", type=Path, default=ROOT / ".training", help="folder for checkpoints")
    parser.add_argument("--measure", action="store_true", help="measure the written models, do not train")
    parser.add_argument("--held-out", type=int, default=2000, help="held-out examples per figure (default: 2000)")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile, which needs a compiler")
    options = parser.parse_args()
    options.models = options.models or list(RECIPES)
    unknown = set(options.models) - set(RECIPES)
    if unknown:
        parser.error(f"unknown model {', '.join(sorted(unknown))}: choose from {', '.join(RECIPES)}")
    return options


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.models:
        recipe = RECIPES[name]
        if options.steps:
            recipe = Recipe(**{**vars(recipe), "steps": options.steps})
        folder = options.out / name
        if not options.measure:
            model = train(name, recipe, options.work, options.seed, not options.no_compile)
            write(model, recipe, folder)
        figures = measure(folder, recipe, options.held_out)
        if not options.measure:
            write_card(name, recipe, folder, figures, options.held_out, options.seed)


if __name__ == "__main__":
    main()
