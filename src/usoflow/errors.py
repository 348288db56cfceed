"""Every error a user can meet: its code, what it means, what to do about it.

Raised anywhere below as `UsoflowError("code", detail)`; shown by the command line (message, remedy and
exit status) and by the server. Knows nothing of the rest of the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

EXIT_USAGE = 2  # the command itself is wrong: unknown file, option, value
EXIT_WORKFLOW = 3  # the workflow or prompt cannot be read or is not valid
EXIT_MODEL = 4  # a model file is missing, damaged or of another kind
EXIT_INPUT = 5  # an input picture is missing, damaged or too large
EXIT_RUN = 6  # the run itself failed: memory, disk, non-finite values
EXIT_CANCELLED = 130  # stopped by the user, as shells report SIGINT


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One entry of the catalogue: what the code means and what a user can do."""

    meaning: str
    remedy: str
    exit_code: int


CATALOGUE: Mapping[str, ErrorKind] = MappingProxyType(
    {
        # --- workflow files -------------------------------------------------------------------------
        "file_not_found": ErrorKind(
            "The file does not exist or cannot be read.", "Check the path.", EXIT_USAGE
        ),
        "template_unknown": ErrorKind(
            "No template has this name.",
            "Use template:flux1_dev_uso_reference_image_gen, or a file.",
            EXIT_USAGE,
        ),
        "not_a_workflow": ErrorKind(
            "The file holds no workflow or prompt.",
            "Give a workflow JSON, an API prompt JSON, or a PNG or WebP that ComfyUI or usoflow saved.",
            EXIT_WORKFLOW,
        ),
        "workflow_invalid": ErrorKind(
            "The workflow is not shaped as a ComfyUI workflow is.",
            "Open it in the ComfyUI editor and save it again.",
            EXIT_WORKFLOW,
        ),
        "subgraph_recursive": ErrorKind(
            "A subgraph contains itself.", "Break the recursion in the editor.", EXIT_WORKFLOW
        ),
        "prompt_invalid": ErrorKind(
            "The prompt does not pass validation.", "Correct the inputs that are named.", EXIT_WORKFLOW
        ),
        "set_invalid": ErrorKind(
            "A --set or --image does not name an input of the workflow.",
            "Write --set NODE.INPUT=VALUE; `usoflow convert FILE` shows the nodes and inputs.",
            EXIT_USAGE,
        ),
        "request_invalid": ErrorKind(
            "What is asked for cannot be generated.",
            "`usoflow generate --help` tells what each option takes.",
            EXIT_USAGE,
        ),
        "node_unknown": ErrorKind(
            "There is no node of this type.", "`usoflow nodes` lists what there is.", EXIT_USAGE
        ),
        "command_invalid": ErrorKind(
            "The command line is not understood.", "See `usoflow --help`.", EXIT_USAGE
        ),
        # --- settings -------------------------------------------------------------------------------
        "settings_invalid": ErrorKind(
            "A setting or a settings file cannot be used.", "Correct or remove it.", EXIT_USAGE
        ),
        "path_outside": ErrorKind(
            "A file name leads out of its folder.",
            "Use a name relative to the folder, without '..'.",
            EXIT_USAGE,
        ),
        # --- pictures -------------------------------------------------------------------------------
        "image_missing": ErrorKind(
            "A picture that the workflow loads is not there.",
            "Put it into the input folder (--input DIR), or give it with --image NODE=PATH.",
            EXIT_INPUT,
        ),
        "image_invalid": ErrorKind(
            "The file is not a picture that can be read.", "Use a PNG, JPEG or WebP picture.", EXIT_INPUT
        ),
        "image_too_large": ErrorKind(
            "The picture has more pixels than the limit.", "Scale it down first.", EXIT_INPUT
        ),
        # --- running --------------------------------------------------------------------------------
        "non_finite": ErrorKind(
            "The result has values that are not numbers (NaN) or infinite; it would be a black picture.",
            "Run with --dtype fp32; if it stays, see what `usoflow models check FILE` says of the model.",
            EXIT_RUN,
        ),
        "node_failed": ErrorKind(
            "A node of the workflow failed.",
            "This is a defect of usoflow: please report it with the workflow and what `usoflow doctor` says.",
            EXIT_RUN,
        ),
        "custom_node_failed": ErrorKind(
            "A custom node failed.",
            "Look into its file in the folder of --custom-nodes, or ask its author.",
            EXIT_RUN,
        ),
        "values_refused": ErrorKind(
            "A custom node does not take the values that it is given (VALIDATE_INPUTS).",
            "Change the inputs of this node.",
            EXIT_WORKFLOW,
        ),
        "out_of_memory": ErrorKind(
            "There is not enough memory for this run.",
            "Let the weights take less with --vram (say --vram 6GB), or use a smaller size or batch, or a"
            " checkpoint in fp8.",
            EXIT_RUN,
        ),
        "save_failed": ErrorKind(
            "The picture could not be written.",
            "Free some space or choose another folder with --output (for previews, with XDG_CACHE_HOME).",
            EXIT_RUN,
        ),
        "device_unavailable": ErrorKind(
            "The device or dtype asked for is not available here.",
            "Use --device auto and --dtype auto.",
            EXIT_USAGE,
        ),
        "budget_invalid": ErrorKind(
            "This is not an amount of memory.",
            "Write a number with a unit: --vram 8GB, 6.5GB, 800MB.",
            EXIT_USAGE,
        ),
        "cancelled": ErrorKind("The run was stopped.", "Run it again.", EXIT_CANCELLED),
        "output_unwritable": ErrorKind(
            "The file cannot be written.", "Check the folder, its permissions and the space left.", EXIT_USAGE
        ),
        # --- server ---------------------------------------------------------------------------------
        "worker_died": ErrorKind(
            "The process that computes ended during the job.",
            "Run it again; if memory is scarce, start with a smaller --vram, or use a smaller size or a"
            " checkpoint in fp8.",
            EXIT_RUN,
        ),
        "state_unusable": ErrorKind(
            "The file with the jobs of the server cannot be used.",
            "Check its folder; a damaged file can be moved away. USOFLOW_STATE names another folder.",
            EXIT_USAGE,
        ),
        "state_in_use": ErrorKind(
            "Another server uses the same file of jobs.",
            "Stop the other server, or give this one a folder of its own with USOFLOW_STATE.",
            EXIT_USAGE,
        ),
        "host_refused": ErrorKind(
            "The Host header names another server.",
            "Open it at 127.0.0.1, let a proxy ask for it by that name, or start it with --token.",
            EXIT_USAGE,
        ),
        "origin_refused": ErrorKind(
            "The request comes from a page of another site.",
            "Use the server's own page; a proxy must pass the Host header on as the browser sent it (nginx:"
            " proxy_set_header Host $http_host).",
            EXIT_USAGE,
        ),
        "token_needed": ErrorKind(
            "The server wants the token that it was started with.",
            "Open /?token=TOKEN once in the browser, or send the header Authorization: Bearer TOKEN.",
            EXIT_USAGE,
        ),
        "body_invalid": ErrorKind(
            "The request is not of the form that the API takes.", "See /docs of the server.", EXIT_USAGE
        ),
        "body_too_large": ErrorKind(
            "The request is larger than the limit.", "Send a smaller picture or workflow.", EXIT_USAGE
        ),
        "file_exists": ErrorKind(
            "There is a file of this name.", "Choose another name, or overwrite=true.", EXIT_USAGE
        ),
        "address_unusable": ErrorKind(
            "The server cannot listen there.", "Choose another --port or --listen.", EXIT_USAGE
        ),
        "queue_full": ErrorKind("The queue takes no more jobs.", "Wait until some are done.", EXIT_RUN),
        "server_stopping": ErrorKind(
            "The server takes no more jobs.", "Send it again when the server has started again.", EXIT_RUN
        ),
        "job_unknown": ErrorKind("There is no job of this id.", "The route /jobs lists them.", EXIT_USAGE),
        "job_exists": ErrorKind("There is a job of this id.", "Choose another prompt_id.", EXIT_USAGE),
        # --- model files ----------------------------------------------------------------------------
        "model_missing": ErrorKind(
            "A model file is not there or cannot be read.",
            "Put the file into its folder, or name the folder with --models or USOFLOW_MODELS.",
            EXIT_MODEL,
        ),
        "model_pickle": ErrorKind(
            "The file is a pickle, which can execute code when it is loaded.",
            "Get the .safetensors version of this model.",
            EXIT_MODEL,
        ),
        "model_damaged": ErrorKind(
            "The file or its metadata is damaged.", "Download the file again.", EXIT_MODEL
        ),
        "model_values": ErrorKind(
            "The file has values that are not finite (NaN or infinite).",
            "The file is damaged: download it again.",
            EXIT_MODEL,
        ),
        "download_failed": ErrorKind(
            "A file could not be downloaded.",
            "Check the network and run it again: it continues where it broke off. HF_TOKEN is needed for"
            " files whose licence is agreed to on the site; HF_ENDPOINT names a mirror.",
            EXIT_MODEL,
        ),
        "licence_declined": ErrorKind(
            "The licences of the files were not agreed to.",
            "Run it again and agree, or put the files where `usoflow models` expects them.",
            EXIT_USAGE,
        ),
        "extra_missing": ErrorKind(
            "A library that this needs is not installed.", "Install the extra that is named.", EXIT_USAGE
        ),
        "model_truncated": ErrorKind(
            "The file is shorter than its header says.",
            "The download did not finish: download the file again.",
            EXIT_MODEL,
        ),
        "model_kind": ErrorKind(
            "The file holds another kind of model than this loader needs.",
            "Choose another file for this loader.",
            EXIT_MODEL,
        ),
        "model_unsupported": ErrorKind(
            "The model has an architecture or size that usoflow does not run.",
            "Use FLUX.1 weights in ComfyUI's or Black Forest Labs' layout.",
            EXIT_MODEL,
        ),
        "tensor_missing": ErrorKind(
            "A tensor that the model needs is not in the file.",
            "The file is incomplete or of another model: download it again.",
            EXIT_MODEL,
        ),
        "tensor_unknown": ErrorKind(
            "The file has tensors that no part of the model uses.",
            "The file is of another model or a newer layout: use the files of the tutorial.",
            EXIT_MODEL,
        ),
        "tensor_shape": ErrorKind(
            "A tensor does not have the shape that the rest of the model needs.",
            "The file is damaged or of another model: download it again.",
            EXIT_MODEL,
        ),
        "block_gap": ErrorKind(
            "The numbers of the model's blocks have a gap.",
            "The file is incomplete: download it again.",
            EXIT_MODEL,
        ),
        "models_mismatch": ErrorKind(
            "Models that are used together do not fit each other.",
            "Choose files of one family: those of the tutorial, or those of one package.",
            EXIT_MODEL,
        ),
        "latent_channels": ErrorKind(
            "The latent is not of the kind that the model takes.",
            "Encode the picture with the model's own VAE.",
            EXIT_WORKFLOW,
        ),
        "batch_mismatch": ErrorKind(
            "Batches that are used together have different sizes.",
            "Use one picture, or as many as the latent's batch_size.",
            EXIT_WORKFLOW,
        ),
        "reference_method": ErrorKind(
            "Unknown method for placing reference pictures.",
            "Use uxo/uno, offset or index.",
            EXIT_WORKFLOW,
        ),
        "lora_mismatch": ErrorKind(
            "The LoRA fits no layer of this model.",
            "Use a LoRA that was made for FLUX.1.",
            EXIT_MODEL,
        ),
        # --- training, and what is computed with pictures ----------------------------------------------
        "training_data": ErrorKind(
            "The drawings that the pocket models are trained on could not be fetched.",
            "Check that npm runs and that the network is there; `usoflow train render` fetches them.",
            EXIT_INPUT,
        ),
        "training_config": ErrorKind(
            "The training file, or what a stage left in the work folder, does not fit this run.",
            "Compare it with training/configs/pocket.toml of the package.",
            EXIT_USAGE,
        ),
        "channel_missing": ErrorKind(
            "A picture does not have the channel that is asked for.",
            "Choose red, green or blue; LoadImage gives transparency as its mask.",
            EXIT_WORKFLOW,
        ),
        "picture_size": ErrorKind(
            "A picture is too small, or would become so, for what is done with it.",
            "Use a larger picture, or a larger size where it is scaled.",
            EXIT_INPUT,
        ),
    }
)


class UsoflowError(Exception):
    """An error with a remedy.

    Args:
        code: a key of `CATALOGUE`.
        detail: what happened, with the names and values concerned; one sentence or a few lines.
        remedy: what to do, where the catalogue's general advice can be made more precise.

    `paths` are the files that a run had written before it failed or was stopped.
    """

    def __init__(self, code: str, detail: str, *, remedy: str | None = None) -> None:
        kind = CATALOGUE[code]
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.remedy = remedy or kind.remedy
        self.exit_code = kind.exit_code
        self.paths: tuple[Path, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """From one process to another, as a pool does with what its workers raise; subclasses too."""
        return _restored, (type(self), self.code, self.detail, self.remedy), self.__dict__


def _restored(kind: type[UsoflowError], code: str, detail: str, remedy: str) -> UsoflowError:
    """What was sent; a subclass's own `__init__`, which would word the detail once more, is not asked."""
    error = kind.__new__(kind)
    UsoflowError.__init__(error, code, detail, remedy=remedy)
    return error


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names, for a message."""
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
