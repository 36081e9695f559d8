"""What clients may ask for: OpenAI's requests with the extras of vLLM, SGLang, llama.cpp and DeepSeek.

Values must have the type that stands here ("1" is no number), null means the default, and names that are not known are
passed over, as those servers do. A name that is known but cannot be honoured is refused: an answer that silently is not
what was asked for helps nobody. What a setting may be beyond its bounds here is checked by `SamplingParams`.

Requests are checked on the event loop, so that a check must not take long whatever is in the request: lists are
bounded, and are given up at their first fault, as pydantic would otherwise list every fault of every item.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST = 2**53 - 1  # whole numbers beyond are not the same in every reader of JSON
MOST_SEED = 2**63 - 1
MAX_STOPS = 1024  # stop texts of a request
MAX_TOP = 20  # likeliest tokens reported of a place
MAX_CHOICES = 128  # completions of a request
MAX_MESSAGES = 10_000  # and parts of a message
MAX_TOOLS = 128  # and calls of a message
MAX_BIASES = 4096  # tokens with a bias
MAX_TOKENS = 1 << 20  # token ids of a prompt, and characters of a text to tokenise


def at_most(most: int) -> BeforeValidator:
    """Counts what is in a list or object, or the characters of a text, before pydantic looks at any of it."""

    def count(given: Any) -> Any:
        if isinstance(given, list | dict | str) and len(given) > most:
            raise ValueError(f"this may have a length of {most} at most, not {len(given)}")
        return given

    return BeforeValidator(count)


Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, le=MOST)]
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), at_most(MAX_TOKENS)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=10_000, fail_fast=True)]
Nothing = Annotated[list[Any], Field(max_length=0)]
Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,18}$")], Annotated[Finite, Field(ge=-100, le=100)]],
    Field(fail_fast=True),
    at_most(MAX_BIASES),
]


class Asked(BaseModel):
    """A JSON object in a request."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, given: Any) -> Any:
        """With 1 for 1.0, which is the same number in JSON."""
        if not isinstance(given, dict):
            return given
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in given.items()
        }


class StreamOptions(Asked):
    include_usage: bool | None = Field(None, description="a last chunk with the usage, before [DONE]")
    continuous_usage_stats: Literal[False] | None = Field(None, description="not supported")


class JsonSchema(Asked):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Asked):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema", description="llama.cpp's place for the schema")


class StructuredOutputs(Asked):
    """vLLM's: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = Field(None, description="a grammar in Lark's notation")


class Sampling(Asked):
    """What both kinds of completions have in common."""

    model: str | None = Field(None, description="the name that /v1/models lists; may be left out")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: Finite | None = Field(None, ge=0, description="0: always the likeliest token")
    top_p: Finite | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MOST, description="0 or -1: all tokens")
    min_p: Finite | None = Field(None, ge=0, le=1)
    stop: str | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-MOST_SEED, le=MOST_SEED)
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    repetition_penalty: Finite | None = Field(None, ge=0.01, le=1e6)
    repeat_penalty: Finite | None = Field(None, ge=0.01, le=1e6, description="llama.cpp's name of repetition_penalty")
    logit_bias: Biases | None = Field(None, description="token id -> what is added to its logit")
    min_tokens: int | None = Field(None, ge=0, le=MOST)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = Field(None, description="false: special tokens are part of the text")
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    return_token_ids: bool | None = Field(None, description="the token ids of prompt and completion in the reply")
    priority: int | None = Field(None, ge=0, le=MOST, description="lower numbers are served first")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Other servers' names for parts of structured_outputs: vLLM's older ones, SGLang's and llama.cpp's.
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = Field(None, description="in Lark's notation")
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    n_predict: int | None = Field(None, ge=-1, le=MOST, description="llama.cpp's name of max_tokens")
    # Known, and not to be had.
    best_of: Literal[1] | None = Field(None, description="not supported beyond 1")
    suffix: Literal[""] | None = Field(None, description="not supported")
    use_beam_search: Literal[False] | None = Field(None, description="not supported")
    include_stop_str_in_output: Literal[False] | None = Field(None, description="not supported")
    bad_words: Nothing | None = Field(None, description="not supported; logit_bias takes token ids")
    allowed_token_ids: Nothing | None = Field(None, description="not supported; structured_outputs bind the text")
    length_penalty: Literal[1] | None = Field(None, description="not supported; it belongs to beam search")
    truncate_prompt_tokens: None = Field(None, description="not supported; send the prompt that is to be read")
    return_routed_experts: Literal[False] | None = Field(None, description="not supported")
    typical_p: Literal[1] | None = Field(None, description="not supported; use top_p or min_p")
    mirostat: Literal[0] | None = Field(None, description="not supported; use top_p or min_p")
    dry_multiplier: Literal[0] | None = Field(None, description="not supported; use repetition_penalty")
    xtc_probability: Literal[0] | None = Field(None, description="not supported")
    n_probs: Literal[0] | None = Field(None, description="not supported; use logprobs")
    ebnf: None = Field(None, description="not supported; structured_outputs.grammar takes Lark's notation")
    grammar: None = Field(None, description="not supported; structured_outputs.grammar takes Lark's notation")
    user: str | None = Field(None, description="taken and passed over")


class TextPart(Asked):
    type: Literal["text"]
    text: str


class RefusalPart(Asked):
    type: Literal["refusal"]
    refusal: str


class FunctionCall(Asked):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Asked):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


Content = str | Annotated[list[TextPart], Field(fail_fast=True), at_most(MAX_MESSAGES)]


class SystemMessage(Asked):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Asked):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Asked):
    role: Literal["assistant"]
    content: str | Annotated[list[TextPart | RefusalPart], Field(fail_fast=True), at_most(MAX_MESSAGES)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="another name of reasoning_content")
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True), at_most(MAX_TOOLS)] | None = None
    prefix: bool | None = Field(None, description="the last message: the reply goes on from it")


class ToolMessage(Asked):
    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True), at_most(MAX_MESSAGES)]


class Function(Asked):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Asked):
    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(fail_fast=True), at_most(MAX_TOOLS)]


class FunctionName(Asked):
    name: str


class NamedTool(Asked):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Asked):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, fail_fast=True), at_most(MAX_TOOLS)]


class AllowedChoice(Asked):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class Thinking(Asked):
    type: Literal["enabled", "disabled"]
    budget_tokens: int | None = Field(None, ge=0, le=MOST, description="another name of thinking_token_budget")


class Conversation(Asked):
    """What the chat template sees, besides the messages."""

    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="further names for the chat template")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking: Thinking | None = Field(None, description="DeepSeek's switch of the thinking")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="the reply goes on from the last message")


class Templated(Conversation):
    messages: Messages


class ChatRequest(Templated, Sampling):
    """POST /v1/chat/completions"""

    max_tokens: int | None = Field(None, ge=-1, le=MOST, description="older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(
        None, ge=-1, le=MOST, description="longest reply, thinking included; -1: what the context holds"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    thinking_token_budget: int | None = Field(None, ge=0, le=MOST, description="tokens after which the thinking ends")
    include_reasoning: bool | None = Field(None, description="false: the thinking is left out of the reply")
    separate_reasoning: bool | None = Field(None, description="false: the thinking is part of the content")
    reasoning_format: Literal["none", "auto", "deepseek"] | None = Field(
        None, description='llama.cpp\'s switch; "none" is separate_reasoning: false'
    )
    stream_reasoning: Literal[True] | None = Field(None, description="not supported; thinking is streamed as it comes")
    chat_template: None = Field(None, description="not supported; the model's own is used")
    functions: None = Field(None, description="not supported; use tools")
    function_call: None = Field(None, description="not supported; use tool_choice")
    audio: None = Field(None, description="not supported")
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, fail_fast=True), at_most(MAX_CHOICES)]
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True), at_most(MAX_CHOICES)]
    )
    max_tokens: int | None = Field(
        None, ge=-1, le=MOST, description="default 16; 0 with echo: the prompt alone; -1: what the context holds"
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP, description="likeliest tokens reported of each place")
    echo: bool | None = Field(None, description="the prompt is part of the text")
    add_special_tokens: bool | None = Field(None, description="false: no bos token before a prompt given as text")


class TokenizeRequest(Conversation):
    """POST /tokenize with a text (`prompt`, or llama.cpp's `content`) or with `messages`, read as for a reply."""

    model: str | None = None
    prompt: Annotated[str, at_most(MAX_TOKENS)] | None = None
    content: Annotated[str, at_most(MAX_TOKENS)] | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Asked):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True), at_most(MAX_TOKENS)]


class ControlRequest(Asked):
    """POST /v1/chat/completions/control: "reasoning_end" makes a reply that is being written stop thinking now."""

    id: str
    action: Literal["reasoning_end"]


UNSUPPORTED = {
    place + name: field.description
    for place, model in (("", ChatRequest), ("", CompletionRequest), ("stream_options.", StreamOptions))
    for name, field in model.model_fields.items()
    if (field.description or "").startswith("not supported")
}
