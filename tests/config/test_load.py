"""YAML files and dotted overrides."""

import pytest

from mistral_ms.config import apply_overrides, load_model_config, read_yaml
from mistral_ms.errors import ConfigError

YAML = """
vocab_size: 320
hidden_size: 64
intermediate_size: 96
num_hidden_layers: 4
num_attention_heads: 8
num_key_value_heads: 2
rope_theta: 1e6  # YAML 1.1 reads this as a string
rms_norm_eps: 1e-5
moe:
  num_local_experts: 8
  sparse_layers: [1, 3]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(YAML)
    return path


class TestLoad:
    def test_reads_a_model(self, file):
        config = load_model_config(file)
        assert (config.hidden_size, config.rope_theta, config.rms_norm_eps) == (64, 1e6, 1e-5)
        assert config.moe.num_local_experts == 8
        assert config.sparse_layers == (1, 3)

    def test_overrides_win_and_the_rest_stays(self, file):
        config = load_model_config(
            file, ["hidden_size=128", "moe.sparse_layers=all", "moe.num_experts_per_tok=1"]
        )
        assert config.hidden_size == 128
        assert config.sparse_layers == (0, 1, 2, 3)
        assert (config.moe.num_experts_per_tok, config.moe.num_local_experts) == (1, 8)

    def test_a_group_can_be_removed(self, file):
        assert load_model_config(file, ["moe=null"]).moe is None

    def test_errors_name_the_file(self, file):
        with pytest.raises(ConfigError, match=r"unknown key: .*model\.yaml: moe\.top_k: 2"):
            load_model_config(file, ["moe.top_k=2"])

    @pytest.mark.parametrize(
        ("override", "advice"),
        [
            ("hiden_size=2", r"perhaps hidden_size; known keys: "),
            ("moe.num_experts=2", r"perhaps moe\.num_local_experts; known keys: "),
            ("num_local_experts=2", r"perhaps moe\.num_local_experts; known keys: "),
            ("paint=2", r"no key is ignored: known keys: "),
        ],
    )
    def test_the_nearest_known_key_is_named(self, file, override, advice):
        with pytest.raises(ConfigError, match=advice):
            load_model_config(file, [override])

    def test_the_nearest_known_value_is_named(self, file):
        with pytest.raises(ConfigError, match=r"torch_dtype: 'flaot16': .*: perhaps float16$"):
            load_model_config(file, ["torch_dtype=flaot16"])

    @pytest.mark.parametrize("override", ["hidden_size=true", "rms_norm_eps=yes", "moe=on"])
    def test_truth_values_are_no_numbers(self, file, override):
        """YAML 1.1 has six words for them, and Python takes them for 1 and 0."""
        key = override.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"{key}: True: true and false are no values of"):
            load_model_config(file, [override])


class TestReadYaml:
    def test_no_such_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"cannot read: .*none\.yaml: No such file"):
            read_yaml(tmp_path / "none.yaml")

    def test_a_directory(self, tmp_path):
        with pytest.raises(ConfigError, match=r"not a file: .*a directory: must be a regular"):
            read_yaml(tmp_path)

    @pytest.mark.parametrize("content", [b"a: [1, 2", b"a: b: c", b"a: !!python/none"])
    def test_not_yaml(self, tmp_path, content):
        path = tmp_path / "bad.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"^not YAML: .*bad\.yaml: ") as caught:
            read_yaml(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "kind"), [("- 1", "list"), ("word", "str"), ("", "NoneType")]
    )
    def test_not_a_mapping(self, tmp_path, content, kind):
        path = tmp_path / "list.yaml"
        path.write_text(content)
        with pytest.raises(ConfigError, match=rf"list\.yaml: {kind}: .*key: value"):
            read_yaml(path)


class TestOverrides:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("3", 3),
            ("1e-3", 1e-3),
            ("1E5", 1e5),
            ("-.5", -0.5),
            ("true", True),
            ("null", None),
            ("", None),
            ("[1, 2]", [1, 2]),
            ("{a: 1}", {"a": 1}),
            ("word", "word"),
            ("a=b", "a=b"),
            ("'1e-3'", 1e-3),
        ],
    )
    def test_values_are_yaml_and_numbers_are_numbers(self, text, value):
        got = apply_overrides({}, [f"key={text}"])["key"]
        assert got == value
        assert type(got) is type(value)

    def test_paths_reach_into_groups_and_make_them(self):
        merged = apply_overrides({"a": {"b": 1, "c": 2}}, ["a.b=3", "x.y.z=4", "a.b=5"])
        assert merged == {"a": {"b": 5, "c": 2}, "x": {"y": {"z": 4}}}

    def test_the_source_is_left_alone(self):
        source = {"a": {"b": 1}}
        apply_overrides(source, ["a.b=2", "a.c=3", "d=4"])
        assert source == {"a": {"b": 1}}

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            ("key", r"invalid override: key: must look like key\.path=value"),
            ("=3", r"invalid override: =3: must look like"),
            ("n.m=3", r"invalid override: n\.m: n: is not a group of keys"),
            ("n.m.k=3", r"invalid override: n\.m\.k: n: is not a group of keys"),
            ("key=[1, 2", r"invalid override: key: \[1, 2: the value must be YAML"),
        ],
    )
    def test_errors(self, item, message):
        with pytest.raises(ConfigError, match=message):
            apply_overrides({"n": 1}, [item])
