// What a caller of the library must know, as JSON: sizes, codes, the fields of structs and the signatures of functions.
//
//   {"block": 64, ..., "levels": [{"name": "plain", ...}, ...], "values": {"bf16": 0, ...}, ...,
//    "structs": {"WeightRef": {"bytes": 40, "fields": [["packed", "pointer"], ["bytes", "int64"], ...]}, ...},
//    "functions": {"castlm_level": ["int32"], "castlm_set_level": ["int32", "int32"], ...}}     the result, then the arguments
//
// Types of fields and functions are read off the declarations by templates. A struct whose list below lacks a field is refused by Python,
// as the sizes differ.

#include <string>
#include <type_traits>

#include "api.h"
#include "attention.h"
#include "table.h"

namespace castlm {
namespace {

template <class T>
const char* type_name() {
  if constexpr (std::is_void_v<T>) return "void";
  else if constexpr (std::is_same_v<T, const char*>) return "text";
  else if constexpr (std::is_pointer_v<T>) return "pointer";
  else if constexpr (std::is_same_v<T, float>) return "float";
  else if constexpr (std::is_same_v<T, int32_t>) return "int32";
  else if constexpr (std::is_same_v<T, int64_t>) return "int64";
  else if constexpr (std::is_same_v<T, uint64_t>) return "uint64";
  else {
    static_assert(std::is_same_v<T, WeightRef>, "a type that Python has no name for");
    return "WeightRef";
  }
}

std::string quoted(const std::string& text) { return "\"" + text + "\""; }

template <class Result, class... Arguments>
std::string signature(const char* name, Result (*)(Arguments...)) {
  std::string text = quoted(name) + ": [" + quoted(type_name<Result>());
  ((text += ", " + quoted(type_name<Arguments>())), ...);
  return text + "]";
}

template <class T>
std::string field(const char* name) {
  return "[" + quoted(name) + ", " + quoted(type_name<T>()) + "]";
}

std::string joined(std::initializer_list<std::string> parts, char open, char close) {
  std::string text(1, open);
  for (const std::string& part : parts) text += (text.size() > 1 ? ", " : "") + part;
  return text + close;
}

std::string number(const char* name, int64_t value) { return quoted(name) + ": " + std::to_string(value); }

template <class T>
std::string structure(const char* name, std::initializer_list<std::string> fields) {
  return quoted(name) + ": {" + number("bytes", sizeof(T)) + ", \"fields\": " + joined(fields, '[', ']') + "}";
}

std::string levels() {
  std::string text;
  for (const LevelFacts& of : kLevels)
    text += (text.empty() ? "" : ", ") + joined({"\"name\": " + quoted(of.name), number("longest_group", of.longest_group),
                                                 number("longest_of_half", of.longest_of_half)}, '{', '}');
  return "\"levels\": [" + text + "]";
}

#define FIELD(name) field<decltype(Of::name)>(#name)
std::string structs() {
  std::string weight, expert, layer, model, sequence, sample;
  {
    using Of = WeightRef;
    weight = structure<Of>("WeightRef", {FIELD(packed), FIELD(bytes), FIELD(rows), FIELD(columns), FIELD(bias)});
  }
  {
    using Of = ExpertSpec;
    expert = structure<Of>("ExpertSpec", {FIELD(gate), FIELD(up), FIELD(down)});
  }
  {
    using Of = LayerSpec;
    layer = structure<Of>("LayerSpec", {FIELD(q), FIELD(k), FIELD(v), FIELD(o), FIELD(gate), FIELD(up), FIELD(down), FIELD(attention_norm),
                                        FIELD(mlp_norm), FIELD(q_norm), FIELD(k_norm), FIELD(post_attention_norm), FIELD(post_mlp_norm),
                                        FIELD(cosines), FIELD(sines), FIELD(window), FIELD(router), FIELD(experts)});
  }
  {
    using Of = ModelSpec;
    model = structure<Of>("ModelSpec", {FIELD(num_layers), FIELD(hidden), FIELD(heads), FIELD(kv_heads), FIELD(head_dim), FIELD(intermediate),
                                        FIELD(vocabulary), FIELD(max_positions), FIELD(rotary_dim), FIELD(num_experts),
                                        FIELD(experts_per_token), FIELD(expert_intermediate), FIELD(activation), FIELD(wide_head_norms),
                                        FIELD(layer_norms), FIELD(is_parallel), FIELD(normalizes_experts), FIELD(epsilon),
                                        FIELD(attention_scale), FIELD(embedding_scale), FIELD(residual_scale), FIELD(logit_scale),
                                        FIELD(logit_cap), FIELD(layers), FIELD(norm), FIELD(head), FIELD(embedding)});
  }
  {
    using Of = Sequence;
    sequence = structure<Of>("Sequence", {FIELD(tokens), FIELD(count), FIELD(position), FIELD(blocks), FIELD(logits), FIELD(all_logits)});
  }
  {
    using Of = SampleSpec;
    sample = structure<Of>("SampleSpec", {FIELD(seed), FIELD(position), FIELD(history), FIELD(bias_tokens), FIELD(biases), FIELD(allowed),
                                          FIELD(num_history), FIELD(num_prompt), FIELD(num_biases), FIELD(temperature), FIELD(top_p),
                                          FIELD(min_p), FIELD(repetition), FIELD(presence), FIELD(frequency), FIELD(top_k), FIELD(num_best),
                                          FIELD(given)});
  }
  return "\"structs\": " + joined({weight, expert, layer, model, sequence, sample}, '{', '}');
}
#undef FIELD

std::string functions() {
#define FUNCTION(name) signature(#name, name)
  return "\"functions\": " +
         joined({FUNCTION(castlm_level), FUNCTION(castlm_runs), FUNCTION(castlm_set_level), FUNCTION(castlm_packed_bytes),
                 FUNCTION(castlm_repack), FUNCTION(castlm_rows_at_once), FUNCTION(castlm_multiply), FUNCTION(castlm_gather),
                 FUNCTION(castlm_unpack), FUNCTION(castlm_model_new), FUNCTION(castlm_model_free), FUNCTION(castlm_model_barriers),
                 FUNCTION(castlm_cache_block_bytes), FUNCTION(castlm_cache_new), FUNCTION(castlm_cache_free),
                 FUNCTION(castlm_cache_release), FUNCTION(castlm_forward), FUNCTION(castlm_sample)}, '{', '}');
#undef FUNCTION
}

std::string codes(const char* name, std::initializer_list<std::string> of) { return quoted(name) + ": " + joined(of, '{', '}'); }

}  // namespace
}  // namespace castlm

using namespace castlm;

const char* castlm_describe() {
  static const std::string text = joined(
      {number("block", kBlock), number("block_tokens", kBlockTokens), number("widest_head", kWidestHead), levels(),
       codes("values", {number("bf16", kBFloat16), number("fp16", kFloat16), number("fp32", kFloat32), number("int8", kInt8),
                        number("int4", kInt4), number("int6", kInt6)}),
       codes("layouts", {number("best", -1), number("rows", kRows), number("panels", kPanels), number("dense", kDense), number("lanes", kLanes)}),
       codes("caches", {number("bf16", kCacheBFloat16), number("int8", kCacheInt8), number("fp32", kCacheFloat32)}),
       codes("activations", {number("silu", kSilu), number("gelu_pytorch_tanh", kGeluTanh), number("gelu", kGelu)}),
       codes("errors", {number("size", kBadSize), number("mask", kBadMask), number("memory", kNoMemory)}), structs(), functions()},
      '{', '}');
  return text.c_str();
}
