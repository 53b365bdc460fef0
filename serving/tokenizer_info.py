"""What clients with a tokenizer of their own need to know of the model's: its class, template and special tokens."""

from schemas import TokenizerInfo
from serving.loading import LoadedModel

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_info(loaded: LoadedModel) -> TokenizerInfo:
    tokenizer = loaded.template.tokenizer
    named = {name: None if (token := getattr(tokenizer, name)) is None else str(token) for name in NAMED}
    added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        chat_template=loaded.template.chat_template,
        **named,
        additional_special_tokens=[token for token in special if token not in named.values()],
        added_tokens_decoder=added,
        model_max_length=loaded.engine.max_model_len,
    )
