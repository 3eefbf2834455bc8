"""The heavy part: torch model to OpenVINO IR through optimum-intel, then weight compression through nncf."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from model_export.options import DEFAULT_GROUP_SIZE, WeightOptions
from ov_kvcrush.errors import ExportError
from ov_kvcrush.model.gguf.convert import gguf_end_tokens, gguf_hf_config, gguf_model_info, run_genai_converter
from ov_kvcrush.model.gguf.detokenizer import show_user_defined_tokens
from ov_kvcrush.model.gguf.reader import read_gguf_header
from ov_kvcrush.model.info import ModelInfo

Progress = Callable[[str], None]
TASK = "text-generation-with-past"
XML = "openvino_model.xml"


def export_folder(source: Path, out: Path, options: WeightOptions, trust_remote_code: bool, say: Progress) -> None:
    """Write IR, tokenizers and configs of the Hugging Face folder `source` into the existing folder `out`."""
    with _quiet():
        say("converting the model")
        _to_ir(source, out, options, trust_remote_code)
        say("converting the tokenizer")
        _convert_tokenizer(source, out, trust_remote_code)
        compress(out, options, say)


def export_gguf(source: Path, out: Path, options: WeightOptions, say: Progress) -> None:
    """Write IR, tokenizers and configs of a GGUF file whose weights are stored anew in the wanted format."""
    say("reading the GGUF weights")
    with tempfile.TemporaryDirectory(dir=out, prefix="hf-") as temporary, _quiet():
        _gguf_to_hf(source, Path(temporary))
        say("converting the model")
        _to_ir(Path(temporary), out, options, trust_remote_code=False)
    say("converting the tokenizer")
    # Not through transformers: it guesses the splitting rules and special tokens of a GGUF, and guesses them wrong;
    # the files of an empty tokenizer that it leaves would be believed before the IR.
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (out / name).unlink(missing_ok=True)
    run_genai_converter(source, out, tokenizer_only=True)
    show_user_defined_tokens(read_gguf_header(source), out)
    with _quiet():
        compress(out, options, say)


def _to_ir(source: Path, out: Path, options: WeightOptions, trust_remote_code: bool) -> None:
    """Write `openvino_model.xml/.bin` and the configs of a Hugging Face folder; no tokenizer, no compression."""
    from optimum.exporters.openvino import main_export
    from optimum.intel.openvino.configuration import OVConfig

    try:
        main_export(
            str(source),
            out,
            task=TASK,
            library_name="transformers",
            # Always given: without one, optimum-intel compresses large models to int8 by itself.
            ov_config=OVConfig(dtype=_stored_dtype(options)),
            stateful=True,
            convert_tokenizer=False,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except Exception as error:
        raise ExportError(f"SOURCE must be a model that optimum-intel can export, got {source}: {error}") from error


def _gguf_to_hf(source: Path, folder: Path) -> None:
    """Write the dequantised model as a Hugging Face folder without a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    header = read_gguf_header(source)
    wanted = gguf_hf_config(header)
    try:
        config: Any = AutoConfig.from_pretrained(str(source.parent), gguf_file=source.name)
        config.head_dim = wanted["head_dim"]  # left at its default for some architectures
        model: Any = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, config=config)
    except Exception as error:
        raise ExportError(f"SOURCE must be a GGUF that transformers can read, got {source}: {error}") from error
    read, told = ModelInfo.from_hf_config(model.config.to_dict()), gguf_model_info(header)
    for field in ("num_layers", "num_heads", "num_kv_heads", "k_head_size", "hidden_size", "vocab_size", "rope"):
        if getattr(read, field) != getattr(told, field):
            raise ExportError(f"{field} must be {getattr(told, field)} as in the GGUF, got {getattr(read, field)}")
    model.generation_config.bos_token_id = wanted.get("bos_token_id")
    model.generation_config.eos_token_id = gguf_end_tokens(header) or None
    model.save_pretrained(folder)


def _stored_dtype(options: WeightOptions) -> str | None:
    """Compressed formats start from the weights as they are stored in the source."""
    return options.weight_format if options.weight_format in ("fp32", "fp16") else None


def _convert_tokenizer(source: Path, out: Path, trust_remote_code: bool) -> None:
    """Write the tokenizer IRs; unlike optimum-intel this does not go on without them."""
    from optimum.exporters.openvino.convert import export_tokenizer
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, local_files_only=True)
        tokenizer.save_pretrained(out)
        export_tokenizer(tokenizer, out, task=TASK)
    except Exception as error:
        raise ExportError(f"SOURCE must have a tokenizer that transformers can read, got {source}: {error}") from error
    if not (out / "openvino_tokenizer.xml").is_file() or not (out / "openvino_detokenizer.xml").is_file():
        raise ExportError(
            f"SOURCE must have a tokenizer that openvino_tokenizers can convert, got {type(tokenizer).__name__} "
            f"from {source}"
        )


def compress(out: Path, options: WeightOptions, say: Progress) -> None:
    """Compress the weights of the IR in `out` in place if the options ask for it."""
    if options.weight_format not in ("int8", "int4"):
        return
    say(f"compressing the weights to {options.weight_format}")
    import nncf
    import openvino as ov

    core = ov.Core()
    # Without this the weights stay mapped from the file that is about to be replaced.
    core.set_property({"ENABLE_MMAP": False})
    model = core.read_model(out / XML)
    mode = f"{options.weight_format.upper()}_{'SYM' if options.sym else 'ASYM'}"
    extra: dict[str, Any] = {}
    if options.weight_format == "int4":
        extra["ratio"] = 1.0 if options.ratio is None else options.ratio
        extra["group_size"] = DEFAULT_GROUP_SIZE if options.group_size is None else options.group_size
        # Rows shorter than a group: the default shrinks it, a size that was asked for is kept to.
        fallback = nncf.GroupSizeFallbackMode.ADJUST if options.group_size is None else nncf.GroupSizeFallbackMode.ERROR
        extra["advanced_parameters"] = nncf.AdvancedCompressionParameters(group_size_fallback_mode=fallback)
    try:
        with redirect_stdout(io.StringIO()):  # nncf draws its own bar
            compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **extra)
    except nncf.InvalidGroupSizeError as error:
        raise ExportError(
            f"group_size must divide the rows of all weights, got {options.group_size}: {error}"
        ) from None
    _forget_f16_cache(compressed)
    ov.save_model(compressed, out / f"compressed_{XML}", compress_to_fp16=False)
    del model, compressed
    for end in (".bin", ".xml"):
        (out / f"compressed_openvino_model{end}").replace(out / f"openvino_model{end}")


def _forget_f16_cache(model: Any) -> None:
    """Drop the wish for an f16 KV cache, which optimum-intel writes for models whose weights are not compressed."""
    if model.has_rt_info(["runtime_options", "KV_CACHE_PRECISION"]):
        options = model.get_rt_info("runtime_options").value
        options.pop("KV_CACHE_PRECISION")
        model.set_rt_info(options, "runtime_options")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the bars and tracing warnings of the libraries inside: the stages are the progress that is shown."""
    import nncf  # noqa: F401 - sets the level of its logger when imported, so it must be imported by now
    import transformers.utils.logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("nncf", "optimum", "openvino.frontend.pytorch.utils")]
    levels = [logger.level for logger in loggers]
    try:
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        for logger, logger_level in zip(loggers, levels, strict=True):
            logger.setLevel(logger_level)
        if bars:
            hf_logging.enable_progress_bar()
