"""What a reply says of tokens: how many, and how likely those of the prompt were."""

from __future__ import annotations

from collections.abc import Sequence

from luciola.engine.sequence import Completion
from luciola.serve.replies import CompletionDetails, PromptDetails, PromptLogprob, Usage
from luciola.serve.tokens import TokenTexts, finite


def usage_of(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Usage:
    """The usage of a reply, whose completions come prompt by prompt, of each the same number. What the cache had of a
    prompt its own completions tell."""
    prompt_tokens = sum(len(ids) for ids in prompts)
    n = len(completions) // len(prompts)
    groups = [completions[i * n : (i + 1) * n] for i in range(len(prompts))]
    generated = sum(len(completion.token_ids) for completion in completions)
    drafted = sum(completion.drafted for completion in completions)
    accepted = sum(completion.accepted for completion in completions)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=generated,
        total_tokens=prompt_tokens + generated,
        prompt_tokens_details=PromptDetails(
            cached_tokens=sum(max((c.cached_tokens for c in group), default=0) for group in groups)
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
