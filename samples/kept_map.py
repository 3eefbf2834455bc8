"""A picture of what policies keep of a text: one row for each layer and KV head, one column for each token.

    ov_kvcrush-export HF_FOLDER_OR_GGUF my-model --attention-scores 32
    python samples/kept_map.py my-model --policies kvcrush,snapkv,streaming_llm --text book.txt --out kept.png
    python samples/kept_map.py                        # the default model, exported to a temporary folder first

Attention comes from the model's own outputs `attention_scores.<layer>`, in plain OpenVINO: docs/attention_scores.md.
"""

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import openvino_genai

from model_export import export_model
from ov_kvcrush import CrushError, native
from ov_kvcrush.config import parse_budget
from ov_kvcrush.kvcache.planning import LEAST_TOKENS
from ov_kvcrush.model.default import default_gguf
from ov_kvcrush.model.fingerprints import model_fingerprint
from ov_kvcrush.model.graph.score_outputs import read_scores_model
from ov_kvcrush.model.info import ModelInfo
from ov_kvcrush.model.plugin import open_core
from ov_kvcrush.policies.base import CacheState, HeadState, Policy
from ov_kvcrush.policies.budgets.planned import planned
from ov_kvcrush.policies.plans.geometry import CacheGeometry
from ov_kvcrush.policies.plans.plan import CachePlan
from ov_kvcrush.policies.plans.planner import BytePlanner
from ov_kvcrush.policies.plans.profile import PROFILE_NAME, read_profile
from ov_kvcrush.policies.registry import build, describe

DEFAULT_WINDOW = 32
CHUNK = 256  # rows of a step; their logits are the largest thing in memory
BOATS = ("red", "green", "white", "blue", "black")
LINES = [f"Day {day}: the {BOATS[day * 7 % 5]} boat came home with {day * 13 % 40} fish." for day in range(1, 31)]
TEXT = "\n".join([*LINES[:12], "The key to the shed is under the third flowerpot.", *LINES[12:], "Where is the key?"])

EVICTED, REPRESENTATIVE, KEPT = 0, 1, 2
COLOURS = {EVICTED: "#e8e6e1", REPRESENTATIVE: "#e07b39", KEPT: "#2b5d8a"}
LABELS = {EVICTED: "evicted", REPRESENTATIVE: "representative", KEPT: "kept"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="exported with --attention-scores; the default model if omitted")
    parser.add_argument("--policies", default="kvcrush,snapkv,streaming_llm", help="names, with commas between them")
    parser.add_argument("--kept", type=float, default=0.25, help="fraction of the tokens that a head keeps on average")
    parser.add_argument("--budget", type=parse_budget, help="instead: a plan of so many of the bytes of bf16, as 1/6")
    parser.add_argument("--text", type=Path, help="a text file; a built-in text if omitted")
    parser.add_argument("--max-tokens", type=int, default=1024, help="read no more of the text than this")
    parser.add_argument("--out", type=Path, default=Path("kept_map.png"), help="the picture: .png, .svg or .pdf")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            run(args, Path(args.model) if args.model else export_default(Path(temporary)))
    except (CrushError, OSError) as error:
        parser.error(str(error))


def run(args: argparse.Namespace, folder: Path) -> None:
    info = ModelInfo.read(folder)
    if info is None or info.attention_scores is None:
        raise CrushError(f"model must be exported with --attention-scores W, got {folder}, which was not")
    if args.max_tokens < 2:
        raise CrushError(f"--max-tokens must be at least 2, got {args.max_tokens}")
    if args.out.suffix not in (".png", ".svg", ".pdf"):
        raise CrushError(f"--out must end in .png, .svg or .pdf, got {str(args.out)!r}")
    policies = {name: policy_of(name, args.kept, info.attention_scores) for name in args.policies.split(",")}
    text = args.text.read_text(encoding="utf-8") if args.text else TEXT
    ids = openvino_genai.Tokenizer(str(folder)).encode(text).input_ids.data[0][: args.max_tokens].astype(np.int64)
    if len(ids) < 2:
        raise CrushError(f"text must have at least 2 tokens, got {len(ids)}")
    if args.budget:
        plan = plan_of(folder, info, args.budget, len(ids))
        policies = {name: planned(policy, plan) for name, policy in policies.items()}
    attention = attention_of(folder, ids, info.attention_scores)
    maps = {name: kept_map(policy, attention, info.num_kv_heads) for name, policy in policies.items()}
    for name, kept in maps.items():
        share, stand_ins = 100 * np.mean(kept != EVICTED), 100 * np.mean(kept == REPRESENTATIVE)
        print(f"{name}: {share:.1f} % of {len(ids)} tokens stay ({stand_ins:.1f} % as representatives)")
    draw(args.out, maps, info.num_layers)
    print(args.out)


def export_default(folder: Path) -> Path:
    export_model(default_gguf(folder, print), folder / "model", attention_scores=DEFAULT_WINDOW)
    return folder / "model"


def policy_of(name: str, kept: float, window: int) -> Policy:
    """The policy over the window that the model has. Raises CrushError if it wants what the model does not tell."""
    settings = {"window": window} if "window" in describe(name).settings else {}
    policy = build(name, kept=kept, **settings)
    inputs = policy.inputs
    unknown = [what for what in ("keys", "values", "queries", "replay") if getattr(inputs, what)]
    if unknown:
        raise CrushError(f"policies must do with attention, got {name!r}, which needs {' and '.join(unknown)}")
    if inputs.window and inputs.reduce != "mean":
        raise CrushError(f"policies must take the mean over the window, got {name!r}, which takes {inputs.reduce}")
    if inputs.window not in (0, window):
        raise CrushError(
            f"policies must take a window of {window} rows as the model has it, got {name!r} with {inputs.window}: "
            f"export the model with --attention-scores {inputs.window} for it"
        )
    return policy


def plan_of(folder: Path, info: ModelInfo, budget: float, length: int) -> CachePlan:
    """How many tokens each KV head keeps of `length`: by the model's profile, else as many in each."""

    def tile_bytes(key: str, value: str, head_size: int) -> int:
        return native.tile_bytes(key, value, head_size, math.gcd(32, head_size))

    heads = (info.num_kv_heads,) * info.num_layers
    path = folder / PROFILE_NAME
    profile = read_profile(path, model_fingerprint(folder), heads) if path.is_file() else None
    geometry = CacheGeometry((info.k_head_size,) * sum(heads), "bf16", 32, LEAST_TOKENS, tile_bytes)
    return BytePlanner(geometry, heads, profile, budget).plan(length)


def attention_of(folder: Path, ids: np.ndarray, window: int) -> list[np.ndarray]:
    """Of each layer float32 (query heads, tokens): what the last `window` tokens look at, mean over them."""
    core = open_core()
    compiled = core.compile_model(read_scores_model(folder, core), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    # The last step has the window's rows and no others, so that its outputs are about just these.
    last = max(0, len(ids) - window)
    begins = [*range(0, last, CHUNK), last]
    for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
        request.infer(
            {
                "input_ids": ids[None, begin:end],
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(begin, end)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
    names = [port.any_name for port in compiled.outputs]
    num_layers = sum(name.startswith("attention_scores.") for name in names)
    return [request.get_tensor(f"attention_scores.{layer}").data[0].copy() for layer in range(num_layers)]


def kept_map(policy: Policy, attention: list[np.ndarray], num_kv_heads: int) -> np.ndarray:
    """uint8 (layers * KV heads, tokens): EVICTED, REPRESENTATIVE or KEPT."""
    length = attention[0].shape[1]
    positions = np.arange(length, dtype=np.int32)
    zeros = np.zeros(length, np.float32) if policy.inputs.state else None
    state = CacheState(
        layers=tuple(
            tuple(HeadState(positions, attention=heads, state=zeros) for heads in np.split(layer, num_kv_heads))
            for layer in attention
        ),
        length=length,
        protected=policy.protected(length),
    )
    selection = policy.select(state, policy.budget.tokens(length))
    kept = np.full((len(attention), num_kv_heads, length), EVICTED, np.uint8)
    for value, chosen in ((KEPT, selection.kept), (REPRESENTATIVE, selection.representatives or [])):
        for layer, heads in enumerate(chosen):
            for head, indices in enumerate(heads):
                kept[layer, head, indices] = value
    return kept.reshape(-1, length)


def draw(path: Path, maps: dict[str, np.ndarray], num_layers: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10, 2.6 * len(maps) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(maps), 1, sharex=True, squeeze=False)[:, 0]
    colours = ListedColormap([COLOURS[value] for value in sorted(COLOURS)])
    for axes, (name, kept) in zip(panels, maps.items(), strict=True):
        axes.imshow(kept, cmap=colours, vmin=EVICTED, vmax=KEPT, aspect="auto", interpolation="nearest")
        heads = len(kept) // num_layers
        layers = range(0, num_layers, max(1, num_layers // 6))
        axes.set_yticks([layer * heads - 0.5 for layer in layers], [str(layer) for layer in layers])
        axes.set_ylabel(f"layer ({heads} KV heads each)", fontsize=8)
        axes.set_title(name, fontsize=10, loc="left")
    panels[-1].set_xlabel("token of the text")
    present = sorted({int(value) for kept in maps.values() for value in np.unique(kept)}, reverse=True)
    figure.legend(
        handles=[Patch(facecolor=COLOURS[value], edgecolor="grey", label=LABELS[value]) for value in present],
        loc="outside upper right",
        ncols=len(present),
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
