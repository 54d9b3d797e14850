"""The end of a run: writes the model, then the adapters, then the report; the most valuable first. The hub is last."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
import torch.distributed as dist

from simpo_megatron.config import Config
from simpo_megatron.convert import export_adapter, export_hf, origin_of
from simpo_megatron.convert.peft_files import CONFIG_FILE
from simpo_megatron.errors import SimPOError, StoppedBySignal, visible
from simpo_megatron.mcore.fp8_weights import whole_masters
from simpo_megatron.mcore.hf import hub_name, push_folder, revision_of
from simpo_megatron.mcore.optimizer import gather_parameters
from simpo_megatron.mcore.precision import export_dtype, parameter_dtype, rounding
from simpo_megatron.reporting.loggers import METRICS_FILE, RunLog
from simpo_megatron.reporting.run_report import Curves, read_curves, write_report
from simpo_megatron.training.start.setup import Job


def finish(config: Config, job: Job, log: RunLog) -> None:
    """Export what was trained, then write the report, and say where everything lies.

    Collectives: those of the exports.

    Raises: CheckpointError, on every rank alike, when an export cannot be written.
    """
    curves = _curves(config, log)
    gather_parameters(job.trainer.chunks)
    origin = None if config.run.save is None else origin_of(config.run.save)
    if config.model.export_hf is not None:
        dtype = export_dtype(config)
        export_hf(
            job.model,
            job.plan.description,
            job.plan.sources.model,
            config.model.export_hf,
            groups=job.trainer.groups,
            dtype=dtype,
            model_card=_card(config, log, config.model.export_hf, curves, dtype),
            chat_template=job.chat_template,
            tokenizer_folder=job.plan.sources.tokenizer,
            in_place_of=whole_masters(job.trainer.optimizer),
            origin=origin,
        )
        log.say(f"model     {config.model.export_hf} (AutoModelForCausalLM loads it)")
        said = rounding([parameter_dtype(config.precision)], dtype)
        if said is not None:
            log.say(f"NOTE      {said} there; --export-dtype stored keeps every bit")
    if config.lora.export_adapter is not None:
        _export_adapters(config, job, config.lora.export_adapter, curves, origin, log)
    _report(config, log)


def _export_adapters(
    config: Config, job: Job, folder: str, curves: Curves | None, origin: str | None, log: RunLog
) -> None:
    """Export the adapters, with a base model that others find where it is one of the hub's.

    Collectives and Raises: those of `export_adapter`.
    """
    named, source = str(config.model.model), job.plan.sources.model
    base_model = hub_name(named) or str(source.absolute())
    export_adapter(
        job.model,
        job.plan.description,
        config.lora,
        base_model,
        folder,
        groups=job.trainer.groups,
        dtype=parameter_dtype(config.precision),
        revision=revision_of(named),
        tokenizer_folder=job.plan.sources.tokenizer,
        model_card=_card(config, log, folder, curves, parameter_dtype(config.precision), is_adapter=True),
        chat_template=job.chat_template,
        origin=origin,
    )
    log.say(f"adapters  {folder} (PeftModel loads them onto {base_model})")
    if hub_name(named) is None:
        log.say(
            f"WARNING   base_model_name_or_path: found the local folder {base_model}, expected a name of the hub; "
            f"write one into {folder}/{CONFIG_FILE} before you share it"
        )


def push(config: Config, log: RunLog) -> None:
    """Push what was exported to the hub, which is worth a warning where it fails: the export is safe."""
    name, folder = config.model.push_to_hub, config.model.export_hf or config.lora.export_adapter
    if name is None or folder is None or dist.get_rank() != 0:
        return
    private = config.model.hub_private_repo
    try:
        log.say(f"hub       {push_folder(folder, name, private=private)}")
    except Exception as error:
        if isinstance(error, StoppedBySignal):
            error = InterruptedError("a signal stopped it")
        # Of an answer of the server, its first line; no text of these errors holds the token.
        reason = visible(str(error).strip().partition("\n")[0])
        log.say(
            f"WARNING   {folder} was not pushed to {name}: {type(error).__name__}: {reason}; "
            f"hf upload {name} {shlex.quote(folder)}{' --private' if private else ''} does it later"
        )


def _card(
    config: Config, log: RunLog, folder: str, curves: Curves | None, dtype: torch.dtype, *, is_adapter: bool = False
) -> str | None:
    """The model card, of which only rank 0's is written; None, and a warning, where it cannot be made."""
    if dist.get_rank() != 0:
        return None
    # A tenth of a second of the hub's client, which no step needs.
    from simpo_megatron.reporting.model_card import model_card

    try:
        return model_card(config, folder, curves, dtype, is_adapter=is_adapter)
    except Exception as error:
        log.say(f"WARNING   {folder} has no model card: {type(error).__name__}: {error}")
        return None


def _curves(config: Config, log: RunLog) -> Curves | None:
    """The curves of the run for its model card, on rank 0; None where there are none to be read."""
    if config.run.save is None or dist.get_rank() != 0:
        return None
    try:
        return read_curves(Path(config.run.save) / METRICS_FILE)
    except (SimPOError, OSError, ValueError) as error:
        log.say(f"WARNING   the model card is written without numbers: {error}")
        return None


def _report(config: Config, log: RunLog) -> None:
    """Write the report; if that fails, warn only, since the model is already saved and exported."""
    if config.run.save is None or dist.get_rank() != 0:
        return
    try:
        report = write_report(config.run.save)
    except Exception as error:
        log.say(f"WARNING   no report was written: {type(error).__name__}: {error}; simpo report {config.run.save}")
        return
    log.say(f"result    {report.headline}")
    log.say(f"report    {report.page} (curves: {report.picture})")
