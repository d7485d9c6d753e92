"""Every Shoal setting of the server: one table, filled from flags, `SHOAL_*` variables and a YAML file."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, FilePath, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

PREFIX = "SHOAL_"
Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseSettings):
    """How to serve. Flags win over `SHOAL_*` variables, those over the YAML file, that over the defaults."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    config: FilePath | None = Field(None, description="YAML file with any of these settings.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: Port = Field(8000, description="Port of the API.")
    operations_port: Port | None = Field(
        None, description="Port for health and metrics, which then are only there; by default they are on the API's."
    )
    served_model_name: list[str] = Field(
        default_factory=list, description="Further names clients may use; the first is the directory's base name."
    )
    tool_call_parser: str = Field(
        "auto", description="How tool calls are read: a parser of vLLM, `none`, or the one that fits the chat template."
    )
    reasoning_parser: str = Field("auto", description="How reasoning is told from the answer, likewise.")
    skip_verification: bool = Field(
        False, description="Do not check the checkpoint's SHA-256 manifest, nor weights against a plan."
    )
    plan: str | None = Field(
        None,
        description="Plan of prune-export to serve a dense model with: a file, its directory, or a hub id.",
    )
    draft: Path | None = Field(
        None, description="Checkpoint pruned from the served model, to guess tokens that the model then checks."
    )
    draft_tokens: PositiveInt = Field(3, description="Tokens the draft guesses at a time.")

    api_keys_file: FilePath | None = Field(
        None, description="File of `name:key` lines; requests then need one of the keys. Reloaded when it changes."
    )
    requests_per_minute: PositiveInt | None = Field(
        None, description="Requests a minute of each key whose line names no limit of its own; more get 429."
    )
    tokens_per_minute: PositiveInt | None = Field(
        None, description="Prompt and output tokens a minute of each key, likewise."
    )
    cors_origins: list[str] = Field(
        default_factory=list, description="Origins browsers may call from; none by default."
    )

    max_queued_requests: int | None = Field(
        256,
        ge=0,
        description="Sequences that may wait beyond those the engine runs at once; more get 503.",
    )
    max_queued_tokens: int | None = Field(
        None,
        ge=0,
        description="Tokens of prompts and of the longest answers asked for that may wait beyond those the KV cache "
        "holds; more get 429. By default 16 times what it holds.",
    )
    max_body_bytes: PositiveInt = Field(4 * 2**20, description="Bytes of a request body; more get 413.")
    max_prompt_tokens: PositiveInt | None = Field(None, description="Tokens of one prompt; more get 400.")
    max_output_tokens: PositiveInt | None = Field(
        None, description="Tokens of one answer, which ends there with `finish_reason: length`."
    )
    max_choices: PositiveInt = Field(16, description="Answers to one prompt, `n` or `best_of`; more get 400.")
    max_sequences: PositiveInt = Field(256, description="Choices times prompts of one request; more get 400.")
    max_top_logprobs: NonNegativeInt = Field(
        20, description="Log-probabilities of each token of an answer; more get 400."
    )
    max_prompt_logprobs: NonNegativeInt = Field(
        5, description="Log-probabilities of each token of a prompt, also by `echo`; more get 400."
    )
    max_stops: NonNegativeInt = Field(
        16, description="Entries of `stop`, `stop_token_ids` or `bad_words`; more get 400."
    )
    max_logit_bias: NonNegativeInt = Field(
        1024, description="Entries of `logit_bias` or `allowed_token_ids`; more get 400."
    )
    max_tools: NonNegativeInt = Field(128, description="Tools of one request; more get 400.")
    max_pattern_size: NonNegativeInt = Field(
        128, description="Tokens of a pattern of `repetition_detection`; more get 400."
    )
    max_grammar_bytes: PositiveInt = Field(
        2**16, description="Bytes of a schema, a regular expression, a grammar, or of all tools; more get 400."
    )
    grammar_seconds: PositiveFloat = Field(
        10.0, description="Seconds a schema or grammar may take to compile; slower ones get 400."
    )
    retry_after_seconds: PositiveFloat = Field(
        1.0, description="Retry-After of a 503 or 429 for a full queue, in seconds."
    )

    grace_seconds: NonNegativeFloat = Field(
        30.0, description="Seconds running requests may take to finish after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged.")
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people, or one JSON object a line.")
    log_prompts: bool = Field(False, description="Let vLLM log prompts and sampling parameters.")

    @model_validator(mode="after")
    def _limits_need_keys(self) -> "Settings":
        if self.api_keys_file is None and (self.requests_per_minute or self.tokens_per_minute):
            raise ValueError("requests_per_minute and tokens_per_minute are limits of API keys: give api_keys_file too")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, variables, then the YAML file that either of them names."""
        path = init_settings().get("config") or os.environ.get(f"{PREFIX}CONFIG")
        if path is None or not Path(path).is_file():
            return init_settings, env_settings
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=path)


def table() -> str:
    """The settings as a Markdown table, for `docs/use/serve.md`."""
    lines = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = (
            ""
            if default is None or default == []
            else f"`{str(default).lower() if default in (True, False) else default}`"
        )
        lines.append(f"| `--{name.replace('_', '-')}` | `{PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(lines)
