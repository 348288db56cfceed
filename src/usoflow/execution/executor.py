"""Runs a prompt: each node that an output needs, once, in order; what is known already is not run again."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.execution.cache import OutputCache, Outputs, constants, keys
from usoflow.execution.memory import PeakMemory, kept_memory
from usoflow.execution.order import NodeError, dated, in_order, of_known_inputs
from usoflow.execution.outputs import check_custom, check_finite, copied, misfit
from usoflow.execution.progress import (
    Cancellation,
    Listener,
    NodeFinished,
    NodeProgress,
    NodesCached,
    NodeStarted,
)
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import is_out_of_memory
from usoflow.nodes.context import NodeContext, Reserve, Shown, unreserved
from usoflow.nodes.custom import hidden_values, is_custom
from usoflow.schema.node import NodeRegistry
from usoflow.schema.specs import InputImage, InputSpec, ModelFile, NodeSchema
from usoflow.schema.values import check_value, unwrapped
from usoflow.settings import Folders
from usoflow.workflow.prompt import Prompt, PromptNode, link_of

logger = logging.getLogger(__name__)


class _ListenerError(Exception):
    """What a listener raised while a node ran: it is the caller's own."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


@dataclass(frozen=True)
class RunResult:
    """What a run gave.

    Attributes:
        shown: what each output node has to show, by node id.
        finished: one record for each node that ran, in order.
        cached: ids of the nodes that were not run, for what they give is known from an earlier run or an
            equal node of this one, or not needed.
        seconds: for the whole run.
        warnings: which outputs were left out, for a node that they need does not take its values.
    """

    shown: Mapping[str, Shown]
    finished: Sequence[NodeFinished]
    cached: Sequence[str]
    seconds: float
    warnings: tuple[str, ...]


@dataclass
class Executor:
    """Runs prompts one after another with the same models and the same cache.

    `instances` are those of custom nodes, by id and type of the node.
    """

    registry: NodeRegistry
    library: ModelLibrary
    cache: OutputCache = field(default_factory=OutputCache)
    instances: dict[tuple[str, str], Any] = field(default_factory=dict)

    def run(
        self,
        prompt: Prompt,
        targets: Sequence[str],
        folders: Folders,
        *,
        workflow: Mapping[str, Any] | None = None,
        listen: Listener = lambda event: None,
        cancellation: Cancellation | None = None,
        reserve: Reserve = unreserved,
    ) -> RunResult:
        """Run what the targets need. What the prompt has no use for is forgotten.

        Args:
            prompt: valid, as `schema.validation` finds.
            targets: ids of the output nodes.
            folders: where files are.
            workflow: the UI graph, to be embedded in pictures.
            listen: is told every event.
            cancellation: stops the run between nodes, steps, and parts of loading, encoding and decoding.
            reserve: is told the path of each picture before it is written.

        Raises:
            NodeError: what went wrong in which node.
            UsoflowError: `cancelled`.
        """
        cancellation = cancellation or Cancellation()
        outer = self.library.check
        self.library.begin_run(cancellation.check)
        run = _Run(self, prompt, folders, workflow, listen, cancellation, reserve)
        try:
            with kept_memory():
                return run.execute(targets)
        finally:
            self.library.check = outer  # of the run from whose listener this one may have been begun

    def needed(self, prompt: Prompt, targets: Sequence[str]) -> list[PromptNode]:
        """The nodes that the targets need, in order.

        Raises:
            NodeError: `node_unknown`.
        """
        known = of_known_inputs(prompt, self.registry)
        return [known.nodes[node_id] for node_id in in_order(known, targets)]

    def clear(self) -> None:
        """Forget outputs, and what custom nodes keep from run to run."""
        self.cache.clear()
        self.instances.clear()


class _Run:
    """The state of one run."""

    def __init__(
        self,
        executor: Executor,
        prompt: Prompt,
        folders: Folders,
        workflow: Mapping[str, Any] | None,
        listen: Listener,
        cancellation: Cancellation,
        reserve: Reserve,
    ) -> None:
        self.executor, self.given, self.folders = executor, prompt, folders
        self.given_json = prompt.to_json()
        self.prompt = dated(of_known_inputs(prompt, executor.registry), datetime.now())
        self.workflow, self.listen, self.cancellation, self.reserve = workflow, listen, cancellation, reserve
        self.outputs: dict[str, Outputs] = {}
        self.finished: list[NodeFinished] = []

    def execute(self, targets: Sequence[str]) -> RunResult:
        start = time.perf_counter()
        cache = self.executor.cache
        targets, left_out = self._without_refused(targets)
        reachable = list(in_order(self.prompt, targets))
        key_of = keys(self.prompt, reachable, self.executor.registry, self.folders, self._told)
        known = {key: outputs for key in key_of.values() if (outputs := cache.get(key)) is not None}
        needed = list(in_order(self.prompt, targets, stop_at={n for n in reachable if key_of[n] in known}))
        first = {key_of[n]: n for n in reversed(needed) if key_of[n] not in known}  # of equal nodes
        to_run = set(first.values())
        cached = [node_id for node_id in reachable if node_id not in to_run]
        again = {n: found for n in cached if (found := _shown(known.get(key_of[n], ())))}
        self.listen(NodesCached(tuple(cached), again))
        try:
            for node_id in needed:
                key = key_of[node_id]
                if key not in known:
                    known[key] = self._run_node(node_id)
                    record = _shown(known[key])
                    cache.put(key, known[key], node_id, record.paths(self.folders) if record else ())
                self.outputs[node_id] = known[key]
        except UsoflowError as error:
            written = (node.shown for node in self.finished if node.shown)
            error.paths = tuple(path for each in written for path in each.paths(self.folders))
            raise
        finally:
            not_asked_for = self.prompt.nodes.keys() - key_of.keys()
            cache.keep_only(set(key_of.values()), not_asked_for)
            self._keep_instances()
        shown = {t: found for t in targets if (found := _shown(self.outputs[t]))}
        return RunResult(shown, self.finished, cached, time.perf_counter() - start, left_out)

    def _keep_instances(self) -> None:
        """Those of custom nodes that this prompt has, as in ComfyUI."""
        present = {(node_id, node.class_type) for node_id, node in self.prompt.nodes.items()}
        for gone in self.executor.instances.keys() - present:
            del self.executor.instances[gone]

    def _without_refused(self, targets: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
        """The outputs that need no custom node that does not take its values, asked before any is run.

        And a line about each of the others. Where none is left, what was said against the first is raised.
        """
        refused = {n: error for n in in_order(self.prompt, targets) if (error := self._refused(n))}
        needed = {target: set(in_order(self.prompt, [target])) for target in targets} if refused else {}
        kept = [target for target in targets if not refused.keys() & needed.get(target, ())]
        if targets and not kept:
            raise next(iter(refused.values()))
        lines = tuple(f"left out, with what needs it: {error.detail}" for error in refused.values())
        for line in lines:
            logger.warning("%s", line)
        return kept, lines

    def _refused(self, node_id: str) -> NodeError | None:
        """What a custom node has against its values, if it can tell."""
        entry = self.executor.registry[self.prompt.nodes[node_id].class_type]
        try:
            refused = entry.refusal and entry.refusal(self._told(node_id))
        except (Exception, SystemExit) as error:
            failed = self._at(node_id, "custom_node_failed", f"VALIDATE_INPUTS: {error!r}")
            failed.__cause__ = error
            return failed
        return self._at(node_id, "values_refused", refused) if refused else None

    def _told(self, node_id: str) -> Mapping[str, Any]:
        """What is known of a node's inputs before anything is run."""
        hidden = hidden_values(self._schema(node_id), node_id, self._prompt_for(node_id), self.workflow)
        return constants(self.prompt.nodes[node_id]) | hidden

    def _prompt_for(self, node_id: str) -> Mapping[str, Any]:
        """As JSON, the same for all but custom nodes that ask for it: they may change it."""
        schema = self._schema(node_id)
        own = is_custom(schema) and "PROMPT" in schema.hidden.values()
        return self.given.to_json() if own else self.given_json

    def _schema(self, node_id: str) -> NodeSchema:
        return self.executor.registry[self.prompt.nodes[node_id].class_type].schema

    def _run_node(self, node_id: str) -> Outputs:
        node = self.prompt.nodes[node_id]
        self.cancellation.check()
        self.listen(NodeStarted(node_id, node.class_type))
        start = time.perf_counter()
        try:
            peak = PeakMemory(self.executor.library.placement.device)
            outputs = self._call_within_memory(node_id)
            schema = self._schema(node_id)
            if is_custom(schema):
                check_custom(outputs, schema.outputs)
            else:
                check_finite(outputs)
        except NodeError:  # of the node that gave it something else than it promises
            raise
        except UsoflowError as error:
            if error.code == "cancelled":
                raise
            raise self._at(node_id, error.code, error.detail, error.remedy) from None
        except _ListenerError as error:
            raise error.cause from None
        except (Exception, SystemExit) as error:  # who asks for the end of its program ends its node
            if is_out_of_memory(error):
                raise self._at(node_id, "out_of_memory", str(error) or "Memory ran out.") from error
            code = "custom_node_failed" if is_custom(self._schema(node_id)) else "node_failed"
            raise self._at(node_id, code, f"{type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - start
        record = NodeFinished(node_id, node.class_type, seconds, peak.bytes(), _shown(outputs))
        self.finished.append(record)
        self.listen(record)
        return outputs

    def _call_within_memory(self, node_id: str) -> Outputs:
        """Where memory runs out, once more with less of it for weights; if that does not help, as before."""
        library = self.executor.library
        library.used.clear()
        try:
            return self._call(node_id)
        except Exception as error:
            again = library.holds_models and not is_custom(self._schema(node_id))
            if not (again and is_out_of_memory(error)):
                raise
        if library.used:
            return self._call_with_less(node_id)
        library.forget_models()  # it uses none: a smaller plan is of no use to it
        return self._call(node_id)

    def _call_with_less(self, node_id: str) -> Outputs:
        """The smaller plan stays where the transformer was at work: the next run is mostly like this one."""
        library = self.executor.library
        before, helped = library.placement, True
        library.make_smaller()
        try:
            return self._call(node_id)
        except Exception as error:
            helped = not is_out_of_memory(error)
            raise
        finally:
            if not (helped and "flux" in library.used):
                library.plan(before)

    def _call(self, node_id: str) -> Outputs:
        node = self.prompt.nodes[node_id]
        entry = self.executor.registry[node.class_type]
        with torch.inference_mode():
            inputs = {name: self._value(entry.schema, name, value) for name, value in node.inputs.items()}
            if entry.schema.takes_context:
                inputs["context"] = self._context(node_id)
            result = entry(**inputs)
        if isinstance(result, Shown):
            return (*result.outputs, result)
        return result if isinstance(result, tuple) else (result,)

    def _value(self, schema: NodeSchema, name: str, value: Any) -> Any:
        link = link_of(value)
        if link is None:
            return unwrapped(value)
        origin, slot = link
        given = self.outputs[origin][slot]
        if is_custom(schema):
            return copied(given)
        spec = schema.input(name)
        return given if spec is None else self._checked(spec, given, origin, slot)

    def _checked(self, spec: InputSpec, given: Any, origin: str, slot: int) -> Any:
        """What a link gives, as validation would have taken it as a value; of files the node says more."""
        if not spec.is_widget:
            left_out = given is None and not spec.required
            if not left_out and is_custom(self._schema(origin)) and (what := misfit(spec.kind.type, given)):
                raise self._at(origin, "custom_node_failed", f"its output {slot} is {what}.")
            return given
        if isinstance(spec.kind, InputImage | ModelFile):
            return given
        converted, errors = check_value(spec, given, self.folders, None)
        if errors:
            what = f"{errors[0]['message']}: {errors[0]['details']} (from node {origin})."
            raise UsoflowError("prompt_invalid", what, remedy=f"Change what node {origin} gives.")
        return converted

    def _context(self, node_id: str) -> NodeContext:
        def report(step: int, steps: int, latent: Tensor | None = None, png: bytes = b"") -> None:
            try:
                self.listen(NodeProgress(node_id, step, steps, latent, png))
            except Exception as error:
                raise _ListenerError(error) from None
            self.cancellation.check()

        return NodeContext(
            folders=self.folders,
            library=self.executor.library,
            report=report,
            prompt=self._prompt_for(node_id),
            workflow=self.workflow,
            node=node_id,
            instances=self.executor.instances,
            reserve=self.reserve,
        )

    def _at(self, node_id: str, code: str, detail: str, remedy: str | None = None) -> NodeError:
        class_type = self.prompt.nodes[node_id].class_type
        return NodeError(code, detail, remedy=remedy, node_id=node_id, class_type=class_type)


def _shown(outputs: Outputs) -> Shown | None:
    """What a node shows: it stands behind its outputs."""
    last = outputs[-1] if outputs else None
    return last if isinstance(last, Shown) else None
