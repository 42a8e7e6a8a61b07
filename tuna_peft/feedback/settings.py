"""The settings of samplers, teachers and judges.

Recipes use these classes as sections, and `tuna-peft sample`, `score`, `judge`, `generate` and `chat` make their
options from them, so that a setting has one name, one default and one description. Only pydantic is imported: a recipe
is checked, and `--help` printed, without torch.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from tuna_peft.data.config import MayBeLocal, Section
from tuna_peft.limits import UNPLANNED_BATCH, UNPLANNED_QUESTIONS, UNPLANNED_TOKENS

Size = PositiveInt | Literal["auto"]

LOCAL_ONLY = ("revision", "trust_remote_code")
"""Settings that have no effect without `model`."""


class ServerSettings(Section):
    """Where an OpenAI-compatible server is, and how it may be used. None of these values is a secret."""

    # A key that was put in the wrong place must not come back in an error message.
    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str = Field(
        description="Address of an OpenAI-compatible server: https://api.openai.com/v1, http://localhost:8000/v1."
    )
    model: str = Field(min_length=1, description="The model's name on that server.")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="Name of the environment variable that holds the API key, never the key itself."
    )
    timeout: PositiveFloat = Field(300.0, description="Seconds to wait for a whole answer.")
    max_retries: int = Field(
        6, ge=0, le=20, description="Maximum retries of a request after 429, 5xx, timeouts and lost connections."
    )
    in_flight: PositiveInt = Field(8, le=256, description="Maximum number of concurrent requests.")
    price_in: float | None = Field(None, ge=0, description="Price of a million prompt tokens.")
    price_out: float | None = Field(None, ge=0, description="Price of a million answer tokens.")
    max_cost: float | None = Field(
        None,
        gt=0,
        description="Stop before the answers cost more, in the prices' currency.",
    )

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("this is not an address like https://host/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("an address has only a host and a path; a key belongs in an environment variable")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _name_of_a_variable(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError(
                "this is not the name of an environment variable; the key itself stays in the environment"
            )
        return value

    @model_validator(mode="after")
    def _a_limit_needs_prices(self) -> ServerSettings:
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("give both `price_in` and `price_out`, or neither")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError("`max_cost` needs `price_in` and `price_out` (per million tokens)")
        return self

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine."""
        return urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1")


class ChatSettings(Section):
    """How `tuna-peft chat` generates an answer."""

    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 takes the most likely token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling probability.")
    max_new_tokens: int = Field(512, ge=1, description="Maximum length of a response, in tokens.")
    seed: int = Field(0, ge=0, description="Seed of the samples.")


class ResponseSettings(ChatSettings):
    """How `tuna-peft generate` generates responses."""

    n: int = Field(1, ge=1, le=1000, description="Responses per prompt.")
    max_new_tokens: int = Field(128, ge=1, description="Maximum length of a response, in tokens.")


class SampleServer(ServerSettings):
    """A server that serves the model to sample from."""

    chat: bool = Field(
        False,
        description="Send messages, which the server's own chat template renders; false sends the rendered text.",
    )


class SampleSettings(Section):
    """How responses are sampled from a model. The defaults are those of Tuna's released code."""

    n: int = Field(4, ge=2, le=1000, description="Responses per prompt.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the first attempt.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling probability.")
    max_new_tokens: int = Field(
        512, ge=1, description="Maximum length of a response, in tokens; longer ones are truncated and counted."
    )
    max_similarity: float = Field(
        0.8,
        gt=0,
        description="Sample a prompt again when two of its responses have this ROUGE-L F1 or more. Above 1: never.",
    )
    hotter_by: float = Field(0.1, ge=0, description="Increase of the temperature for each new sampling attempt.")
    trials: int = Field(3, ge=1, description="Maximum sampling attempts; the most diverse set of responses is kept.")
    batch_size: Size = Field(
        "auto",
        description="Responses generated at once, halved when memory runs out; `auto` follows the device's memory.",
    )
    backend: Literal["transformers", "vllm"] = Field(
        "transformers", description="`vllm` is faster on a GPU with room for a second copy of the model; extra `vllm`."
    )
    server: SampleServer | None = Field(
        None, description="An OpenAI-compatible server that serves the same model and generates the responses."
    )

    @model_validator(mode="after")
    def _one_engine(self) -> SampleSettings:
        if self.server is not None and self.backend != "transformers":
            raise ValueError("`backend` has no effect with `server`")
        return self

    @property
    def responses_at_once(self) -> int:
        """The batch size; a number also where no plan has replaced `auto`."""
        return UNPLANNED_BATCH if self.batch_size == "auto" else self.batch_size


class GenerateSettings(Section):
    """Responses that the teacher's server samples itself, as text-davinci-003 did for the paper."""

    n: int = Field(4, ge=2, le=128, description="Responses per prompt.")
    temperature: float = Field(1.0, gt=0, le=2, description="Sampling temperature of the server.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling probability.")
    max_tokens: int = Field(512, ge=1, description="Maximum length of a response, in the server's tokens.")


class LocalModelSettings(Section):
    """A teacher or judge that runs on this machine: what `ScoreSettings` and `JudgeSettings` have in common."""

    model_config = ConfigDict(hide_input_in_errors=True)

    model: Annotated[str | None, MayBeLocal()] = Field(
        None, description="A model on this machine: Hub id, path, `builtin:pico-llama`, a stack, or a run's folder."
    )
    revision: str | None = Field(None, description="With `model`: branch, tag or commit on the Hub.")
    quantization: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="With `model`: quantization of a single model; a stack keeps its own."
    )
    trust_remote_code: bool = Field(False, description="With `model`: run Python code that comes with the model.")


class ScoreSettings(LocalModelSettings):
    """A teacher whose log-probabilities rank the responses: either `model` or `server`."""

    max_tokens_per_batch: Size = Field(
        "auto",
        description="With `model`: maximum tokens in a forward pass, halved when memory runs out; `auto` follows the "
        "device's memory.",
    )
    server: ServerSettings | None = Field(
        None, description="A teacher behind a completions server that returns log-probabilities of the prompt."
    )
    tokenizer: Annotated[str | None, MayBeLocal()] = Field(
        None,
        description="With `server`: the teacher's tokenizer. Prompts are then sent as token ids, with EOS after the "
        "response, and the server must know vLLM's `prompt_logprobs`. Without it text is sent, with `echo` and "
        "`logprobs`.",
    )
    generate: GenerateSettings | None = Field(
        None, description="With `server`: it samples the responses itself and scores them in the same request."
    )
    length_penalty: float = Field(1.0, ge=0, description="score = sum of token log-probabilities / length ** this.")
    on_no_answer: Literal["error", "skip"] = Field(
        "error",
        description="With `server`: what to do about prompts without an answer once all others are answered: stop "
        "with an error, or skip and count them.",
    )

    @property
    def tokens_at_once(self) -> int:
        """Tokens in a forward pass; a number also where no plan has replaced `auto`."""
        return UNPLANNED_TOKENS if self.max_tokens_per_batch == "auto" else self.max_tokens_per_batch

    @model_validator(mode="after")
    def _one_teacher(self) -> ScoreSettings:
        if (self.model is None) == (self.server is None):
            raise ValueError("give either `model` (a teacher on this machine) or `server`")
        given, other = ("server", LOCAL_ONLY) if self.server else ("model", ("tokenizer", "generate"))
        for name in other:
            if getattr(self, name):
                raise ValueError(f"`{name}` has no effect with `{given}`")
        if self.generate is not None and self.tokenizer is not None:
            raise ValueError("`tokenizer` has no effect with `generate`: the server counts its own tokens")
        return self


class JudgeSettings(LocalModelSettings):
    """Who ranks the responses, and how: one of `server`, `model` and `function`."""

    server: ServerSettings | None = Field(None, description="A judge behind an OpenAI-compatible server.")
    function: str | None = Field(
        None,
        description="A Python function as judge, for tasks whose answers can be checked: `module:function`, "
        "`builtin:references` (exact match, then ROUGE-L against the references in the record) or `builtin:pico`. It "
        "is given a prompt's record and a response and returns a number; higher is better.",
    )
    instructions: str | None = Field(None, description="Additional criteria for the judge, in your own words.")
    both_orders: bool = Field(
        False,
        description="Ask twice, with the responses in opposite order; where the answers disagree there is a tie.",
    )
    include_judge_answer: Literal[False, True, "reference"] = Field(
        False,
        description="What to do with the judge's own response: true ranks it first (only where the judge does so, "
        "too), `reference` makes it the reference response, false leaves it out.",
    )
    structured: bool = Field(
        True, description="Ask a server for JSON by schema; switched off for servers that do not support it."
    )
    temperature: float = Field(
        0.0, ge=0, le=2, description="Sampling temperature of the first attempt; later attempts use a higher one."
    )
    max_tokens: PositiveInt = Field(2048, description="Maximum length of the judge's answer, in tokens.")
    attempts: PositiveInt = Field(3, le=20, description="Maximum attempts until an answer can be read.")
    seed: int = Field(0, description="Seed of the order in which responses are shown.")
    batch_size: Size = Field(
        "auto", description="With `model`: questions answered at once; `auto` follows the device's memory."
    )
    on_no_answer: Literal["error", "skip"] = Field(
        "error",
        description="What to do about prompts for which a server gives no answer, or a function no number: `error` "
        "stops once all others are answered, `skip` skips and counts them, as Vicuna QA always does. Answers that "
        "cannot be read are skipped in any case.",
    )

    @property
    def questions_at_once(self) -> int:
        """The batch size; a number also where no plan has replaced `auto`."""
        return UNPLANNED_QUESTIONS if self.batch_size == "auto" else self.batch_size

    @model_validator(mode="after")
    def _one_judge(self) -> JudgeSettings:
        given = [name for name in ("server", "model", "function") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of `server`, `model` and `function`, not {' and '.join(given) or 'none'}")
        for name in LOCAL_ONLY:
            if self.model is None and getattr(self, name):
                raise ValueError(f"`{name}` has no effect without `model`")
        if self.function is not None:
            for name in ("instructions", "both_orders", "include_judge_answer"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` has no effect with `function`, which grades each response by itself")
        return self
