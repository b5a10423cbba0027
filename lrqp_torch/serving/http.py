"""The server's side: certificates in answers, refusals as 400, promises not kept as 422.

vLLM answers in OpenAI's forms, which allow further fields: each choice of a completion or a chat
that was edited has ``lrqp``, the records of :func:`~lrqp_torch.serving.plugin.certificates`; in a
stream, the last chunk of each choice.
"""

import functools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from lrqp_torch.errors import RequestError
from lrqp_torch.serving.requests import ARGUMENT

FIELD = "lrqp"
"""What a choice's certificates are called."""
DATA = "data: "
"""Opens each line of a stream."""


def wrap_server(wrap: Callable[[Any, str, Callable[..., Any]], None]) -> None:
    """Put this around vLLM's front end; its endpoints follow when there is an engine to serve.

    Args:
        wrap: puts a function in place of one of vLLM's, which it is given first.
    """
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

    def start(inner: Callable[..., None], engine: Any, *args: Any, **kwargs: Any) -> None:
        # Workers never come here, and so need not load the endpoints.
        _wrap_endpoints(wrap)
        inner(engine, *args, **kwargs)

    wrap(AsyncLLM, "__init__", start)
    wrap(AsyncLLM, "add_request", _add)
    wrap(AsyncLLM, "generate", _generate)
    wrap(RequestOutput, "add", _merge)


def _wrap_endpoints(wrap: Callable[[Any, str, Callable[..., Any]], None]) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for request in (CompletionRequest, ChatCompletionRequest, ResponsesRequest):
        wrap(request, "to_sampling_params", _asked_rightly)
    for request in (CompletionRequest, ChatCompletionRequest):
        wrap(request, "to_beam_search_params", _no_beams)
    wrap(OpenAIServingCompletion, "request_output_to_completion_response", _completions)
    wrap(OpenAIServingChat, "chat_completion_full_generator", _chat)
    wrap(OpenAIServingCompletion, "completion_stream_generator", _completion_stream)
    wrap(OpenAIServingChat, "chat_completion_stream_generator", _chat_stream)


@functools.cache
def _refusal() -> type[RequestError]:
    """The error that vLLM tells the client as a 400; others would be failures of the engine."""
    from vllm.exceptions import VLLMClientError

    return type("RefusedError", (RequestError, VLLMClientError), {})


async def _add(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Take a request into the engine, or refuse it."""
    try:
        return await inner(*args, **kwargs)
    except RequestError as error:
        raise _refusal()(str(error)) from error


def _asks(extra: Any) -> bool:
    return isinstance(extra, dict) and ARGUMENT in extra


def _generate(
    inner: Callable[..., Any],
    engine: Any,
    prompt: Any,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> AsyncIterator[Any]:
    """The outputs of a request, of which one that broke its promise is an error that says so."""
    outputs = inner(engine, prompt, params, *args, **kwargs)
    # A request without edits keeps vLLM's own generator, and its speed.
    return _kept(outputs) if _asks(getattr(params, "extra_args", None)) else outputs


async def _kept(outputs: Any) -> AsyncIterator[Any]:
    from vllm.exceptions import VLLMUnprocessableEntityError

    async with aclosing(outputs):
        async for output in outputs:
            for choice in output.outputs:
                report = getattr(choice, FIELD, None)
                if report is not None and report["error"] is not None:
                    raise VLLMUnprocessableEntityError(f"{ARGUMENT}: {report['error']}")
            yield output


def _merge(inner: Callable[..., None], first: Any, later: Any, *args: Any, **kwargs: Any) -> None:
    """One output with what came after it; the first of each choice takes the last's numbers."""
    inner(first, later, *args, **kwargs)
    merged = {choice.index: choice for choice in first.outputs}
    for choice in later.outputs:
        if hasattr(choice, FIELD):
            setattr(merged[choice.index], FIELD, getattr(choice, FIELD))


def _asked_rightly(inner: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse edits where vLLM would pass them over without a word."""
    aside = request.model_extra or {}
    if ARGUMENT in aside or _asks(aside.get("extra_args")):
        raise _refusal()(
            f'{ARGUMENT!r} belongs into "vllm_xargs", as a JSON string: '
            f'"vllm_xargs": {{"{ARGUMENT}": "{{\\"edit\\": …}}"}}'
        )
    return inner(request, *args, **kwargs)


def _no_beams(inner: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    aside = request.model_extra or {}
    if any(map(_asks, (request.vllm_xargs, aside, aside.get("extra_args")))):
        raise _refusal()(f"{ARGUMENT}: edits are not served with beam search")
    return inner(request, *args, **kwargs)


def _attach(choice: Any, output: Any) -> None:
    """Give a choice the certificates of its output, if it has any."""
    report = getattr(output, FIELD, None)
    if report is not None:
        setattr(choice, FIELD, report["edits"])


def _bare(response: Any) -> None:
    """Take the certificates out of where they came through, which names the first alone."""
    passed = getattr(response, "kv_transfer_params", None)
    if passed and FIELD in passed:
        rest = {name: value for name, value in passed.items() if name != FIELD}
        response.kv_transfer_params = rest or None


def _completions(
    inner: Callable[..., Any], serving: Any, batch: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """The answer to a completion, whose choices are the outputs of all prompts in a row."""
    response = inner(serving, batch, request, *args, **kwargs)
    outputs = [output for each in batch for output in each.outputs]
    for choice, output in zip(response.choices, outputs, strict=True):
        _attach(choice, output)
    _bare(response)
    return response


async def _chat(
    inner: Callable[..., Any], serving: Any, request: Any, results: Any, *args: Any, **kwargs: Any
) -> Any:
    """The answer to a chat."""
    if not _asks(request.vllm_xargs):
        return await inner(serving, request, results, *args, **kwargs)
    last: list[Any] = []

    async def noted() -> AsyncIterator[Any]:
        async for result in results:
            last[:] = [result]
            yield result

    response = await inner(serving, request, noted(), *args, **kwargs)
    if last and hasattr(response, "choices"):
        for choice, output in zip(response.choices, last[0].outputs, strict=True):
            _attach(choice, output)
        _bare(response)
    return response


def _completion_stream(
    inner: Callable[..., Any],
    serving: Any,
    request: Any,
    prompts: Any,
    results: Any,
    *args: Any,
    **kwargs: Any,
) -> AsyncIterator[str]:
    """The chunks of a completion of several prompts, n choices each."""
    if not _asks(request.vllm_xargs):
        chunks: AsyncIterator[str] = inner(serving, request, prompts, results, *args, **kwargs)
        return chunks
    ended: dict[int, Any] = {}

    async def noted() -> AsyncIterator[Any]:
        async for place, result in results:
            _note(result, place * (request.n or 1), ended)
            yield place, result

    return _with_ends(inner(serving, request, prompts, noted(), *args, **kwargs), ended)


def _chat_stream(
    inner: Callable[..., Any], serving: Any, request: Any, results: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    """The chunks of a chat."""
    if not _asks(request.vllm_xargs):
        chunks: AsyncIterator[str] = inner(serving, request, results, *args, **kwargs)
        return chunks
    ended: dict[int, Any] = {}

    async def noted() -> AsyncIterator[Any]:
        async for result in results:
            _note(result, 0, ended)
            yield result

    return _with_ends(inner(serving, request, noted(), *args, **kwargs), ended)


def _note(result: Any, first: int, ended: dict[int, Any]) -> None:
    """Keep the certificates of the choices that end with this result, by their index."""
    for output in result.outputs:
        report = getattr(output, FIELD, None)
        if report is not None and output.finish_reason is not None:
            ended[first + output.index] = report["edits"]


async def _with_ends(chunks: Any, ended: dict[int, Any]) -> AsyncIterator[str]:
    """The lines of a stream, in which the last chunk of each choice has its certificates."""
    async with aclosing(chunks):
        async for line in chunks:
            if ended and line.startswith(DATA + "{"):
                chunk = json.loads(line[len(DATA) :])
                for choice in chunk.get("choices", ()):
                    if choice.get("finish_reason") is not None and choice["index"] in ended:
                        choice[FIELD] = ended.pop(choice["index"])
                        line = f"{DATA}{json.dumps(chunk)}\n\n"
            yield line
