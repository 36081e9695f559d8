"""What a reply says of tokens: how many, and how likely those of the prompt were."""

from __future__ import annotations

from collections.abc import Sequence

from luciola.engine.sequence import Completion
from luciola.serve.replies import CompletionDetails, PromptDetails, PromptLogprob, Usage
from luciola.serve.tokens import TokenTexts, finite


def usage_of(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Usage:
    """The usage of a reply; of a prompt that the cache had, each prompt's own completions tell."""
    prompt_tokens = sum(len(ids) for ids in prompts)
    generated = sum(len(completion.token_ids) for completion in completions)
    drafted = sum(completion.drafted for completion in completions)
    accepted = sum(completion.accepted for completion in completions)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=generated,
        total_tokens=prompt_tokens + generated,
        prompt_tokens_details=PromptDetails(
            cached_tokens=min(prompt_tokens, max((c.cached_tokens for c in completions), default=0))
        ),
        completion_tokens_details=CompletionDetails(
            reasoning_tokens=sum(completion.thinking_tokens for completion in completions),
            accepted_prediction_tokens=accepted,
            rejected_prediction_tokens=drafted - accepted,
        ),
    )


def prompt_logprobs(
    texts: TokenTexts, ids: Sequence[int], completion: Completion
) -> list[dict[str, PromptLogprob] | None] | None:
    """Of each token of the prompt but the first: its log-probability and the likeliest ones', by token id, as vLLM has
    it; None unless they were asked for."""
    if completion.prompt_logprobs is None or completion.prompt_top_logprobs is None:
        return None
    places: list[dict[str, PromptLogprob] | None] = []
    for token, logprob, top in zip(ids, completion.prompt_logprobs, completion.prompt_top_logprobs, strict=True):
        if logprob is None:
            places.append(None)
            continue
        known = {token: logprob, **(top or {})}
        places.append(
            {str(t): PromptLogprob(logprob=finite(value), decoded_token=texts.text(t)) for t, value in known.items()}
        )
    return places


def numbers_of(
    prompts: Sequence[Sequence[int]], completions: Sequence[Completion | None], generated: int
) -> dict[str, int | str]:
    """What the access log says of a request, for which so many tokens have been generated."""
    done = [completion for completion in completions if completion is not None]
    reasons = sorted({completion.finish_reason for completion in done})
    return {
        "prompt_tokens": sum(len(ids) for ids in prompts),
        "completion_tokens": generated,
        "finish": ",".join(reasons) if len(done) == len(completions) else "left",
    }
