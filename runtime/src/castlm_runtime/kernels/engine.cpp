// A pass of new tokens of many sequences through a model: embeddings, norms, rotary embedding, attention over the cache, MLP or
// experts, output head.
//
// All threads walk the pass together (team.h). A row is a token; a step ends where a thread needs what others computed:
//
//   step   reads                 computes, each thread its fixed share                           writes
//   1      x                     norm; q, k, v: tiles of all three in one row                    query, key, value
//   2      query, key, value     attention: heads of keys, parts of 256 positions                parts
//   3      parts                 sums of the parts; o: tiles                                     added
//   4      x, added              x += added; norm; gate and up: the same tiles; activation       gate
//   5      gate                  down: tiles                                                     added
//
// In a block with experts these take the place of steps 4 and 5:
//
//   4      x, added              x += added; norm; router: tiles                                 router
//   5      router, input         choice of experts; each expert's gate and up: the same tiles    gate
//   6      gate                  each expert's down: tiles                                       routed
//
// Every thread makes the choice for itself. A slot is the place of a row at one of its experts; the slots of an expert follow each
// other, so that an expert multiplies the rows that chose it as if they were all there are. `complete` sums the slots of a row.
//
// Up to `kFewRows` rows, what comes before the tiles (x += added, norms, sums of parts, rounding to int8) is done by every thread for
// itself, with an x of its own: it takes less time than a barrier. So a token has five barriers a layer, six with experts. With
// more rows each thread prepares a share of them for all, and another barrier follows. Tokens of prompts also get a step that puts all
// keys into the cache before attention; a single token's key is put there by the thread that reads its part of the context.
//
// Results do not depend on the number of threads: tiles are summed in the same order whoever takes them, parts of the context are
// fixed, and attention's work items, which threads take in turn as they are not equally long, are independent.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "api.h"
#include "attention.h"
#include "plain.h"
#include "team.h"

namespace castlm {
namespace {

constexpr int64_t kFewRows = 4;        // which every thread prepares for itself
constexpr int64_t kFewTokens = 4;      // of a sequence, whose attention is that of single tokens
constexpr int64_t kLogitRows = 64;     // rows of logits at a time
constexpr int64_t kExpertRows = 64;    // rows at an expert at a time
constexpr int64_t kMaxExperts = 1 << 16;
constexpr int64_t kKeptFloats = 1 << 20;  // of a buffer; a larger one is freed when a pass needs less
constexpr float kLog2E = 1.44269504f;

int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }
int64_t padded(int64_t columns) { return whole(columns, kBlock); }

// ---- arithmetic on rows

INLINE float dot(const float* a, const float* b, int64_t count) {
  float sums[16] = {}, rest = 0;
  int64_t k = 0;
  for (; k + 16 <= count; k += 16)
    for (int i = 0; i < 16; ++i) sums[i] += a[k + i] * b[k + i];
  for (; k < count; ++k) rest += a[k] * b[k];
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0] + rest;
}

// to = weight * x / rms(x); a null weight copies x.
EACH_CPU void rms_norm(const float* x, const float* weight, int64_t count, float epsilon, float* to) {
  if (!weight) {
    if (to != x) std::copy_n(x, count, to);
    return;
  }
  const float factor = 1.0f / std::sqrt(dot(x, x, count) / float(count) + epsilon);
  for (int64_t k = 0; k < count; ++k) to[k] = weight[k] * (x[k] * factor);
}

// to = weight * (x - mean) / deviation + bias.
EACH_CPU void layer_norm(const float* x, const float* weight, const float* bias, int64_t count, float epsilon, float* to) {
  float sums[16] = {}, mean = 0;
  int64_t k = 0;
  for (; k + 16 <= count; k += 16)
    for (int i = 0; i < 16; ++i) sums[i] += x[k + i];
  for (; k < count; ++k) mean += x[k];
  for (int i = 0; i < 16; ++i) mean += sums[i];
  mean /= float(count);
  for (k = 0; k < count; ++k) to[k] = x[k] - mean;
  const float factor = 1.0f / std::sqrt(dot(to, to, count) / float(count) + epsilon);
  for (k = 0; k < count; ++k) to[k] = weight[k] * (to[k] * factor) + bias[k];
}

// to = x + scale * to.
EACH_CPU void add_to_scaled(const float* x, float scale, int64_t count, float* to) {
  for (int64_t k = 0; k < count; ++k) to[k] = x[k] + scale * to[k];
}

EACH_CPU void add_scaled(float* sum, const float* x, float scale, int64_t count) {
  for (int64_t k = 0; k < count; ++k) sum[k] += scale * x[k];
}

EACH_CPU void scale_by(float* x, float scale, int64_t count) {
  for (int64_t k = 0; k < count; ++k) x[k] *= scale;
}

// exp to within 2e-7 of its value, in operations that a compiler turns into vectors (cephes' expf).
INLINE float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;      // NaN stays
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are the nearest integer
  const float nearest = shifted - 12582912.0f;
  const float r = x - nearest * 0.693359375f + nearest * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.0f) * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
}

// gate = f(gate) * up, or f(gate) where `up` is null.
template <class F>
INLINE void activate(float* gate, const float* up, int64_t count, F f) {
  if (up) for (int64_t k = 0; k < count; ++k) gate[k] = f(gate[k]) * up[k];
  else for (int64_t k = 0; k < count; ++k) gate[k] = f(gate[k]);
}

EACH_CPU void silu(float* gate, const float* up, int64_t count) {
  activate(gate, up, count, [](float x) { return x / (1.0f + fast_exp(-x)); });
}

// gelu by tanh: x / (1 + exp(-2 c (x + 0.044715 x^3))) with c = sqrt(2 / pi).
EACH_CPU void gelu_tanh(float* gate, const float* up, int64_t count) {
  activate(gate, up, count, [](float x) { return x / (1.0f + fast_exp(-1.5957691216f * (x + 0.044715f * x * x * x))); });
}

// gelu: x * P(normal < x), by Abramowitz and Stegun 7.1.26, which has the tail P(normal > |x|) to within 8e-8.
EACH_CPU void gelu(float* gate, const float* up, int64_t count) {
  activate(gate, up, count, [](float x) {
    const float z = (x < 0 ? -x : x) * 0.70710678119f, t = 1.0f / (1.0f + 0.3275911f * z);
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const float tail = 0.5f * p * fast_exp(-z * z);
    return x * (x < 0 ? tail : 1.0f - tail);
  });
}

using Activate = void (*)(float* gate, const float* up, int64_t count);
Activate activation_of(int32_t activation) { return activation == kSilu ? silu : activation == kGeluTanh ? gelu_tanh : gelu; }

EACH_CPU void softmax(const float* x, int64_t count, float* to) {
  float most = x[0], sum = 0;
  for (int64_t k = 1; k < count; ++k) most = x[k] > most ? x[k] : most;
  for (int64_t k = 0; k < count; ++k) to[k] = fast_exp(x[k] - most);
  for (int64_t k = 0; k < count; ++k) sum += to[k];
  for (int64_t k = 0; k < count; ++k) to[k] /= sum;
}

// Dimension i of a head turns with dimension i + half.
EACH_CPU void rotate(float* head, const float* cosines, const float* sines, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float low = head[i], high = head[half + i];
    head[i] = low * cosines[i] - high * sines[i];
    head[half + i] = high * cosines[i] + low * sines[i];
  }
}

EACH_CPU void put_position(const HeadBlocks& of, int64_t position, const float* key, const float* value) {
  write_position(of, position, key, value);
}

EACH_CPU void combine(const float* parts, int64_t count, int64_t stride, int64_t width, float* to) {
  combine_parts(parts, count, stride, width, to);
}

// ---- weights and buffers

struct Weight {
  Header of{};
  const uint8_t* data = nullptr;
  const float* bias = nullptr;
};

// Numbers at the start of a cache line, which stay from pass to pass. New memory is zero.
class Buffer {
 public:
  float* sized(int64_t count) {
    if (count > size_ || (size_ > kKeptFloats && count <= kKeptFloats)) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t(64))));
      std::fill_n(memory_.get(), count, 0.0f);
      size_ = count;
    }
    return memory_.get();
  }
  float* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };
  std::unique_ptr<float[], Free> memory_;
  int64_t size_ = 0;
};

// The MLP of a block, or one of its experts.
struct Mlp {
  Weight gate, up, down;
  int64_t width = 0;  // the rows of up
  bool is_gated = false;
};

struct Layer : LayerSpec {
  explicit Layer(const LayerSpec& spec) : LayerSpec(spec) {}
  Weight q_weight, k_weight, v_weight, o_weight, router_weight;
  std::vector<Mlp> mlps;  // the experts, or one
};

// The experts that the rows of a pass have chosen in a block.
struct Routing {
  std::vector<float> probabilities;   // (num_experts,) of the row in question
  std::vector<uint8_t> is_taken;      // the same
  std::vector<int32_t> expert;        // (rows, experts_per_token)
  std::vector<float> share;           // the same: what the expert's output counts
  std::vector<int64_t> slot;          // the same
  std::vector<int64_t> first, count;  // (num_experts,): the slots of an expert; the first one is a multiple of 16
  std::vector<int64_t> row;           // of a slot
};

// What a thread has for itself: a row of x and its forms while few rows pass, and rows at an expert.
struct Own {
  Buffer x, input, room, gathered;
  Routing routing;
};

bool take(const WeightRef& from, int64_t rows, int64_t columns, Weight& to) {
  if (from.rows != rows || from.columns != columns) return false;
  const auto* const packed = static_cast<const uint8_t*>(from.packed);
  if (!read_header(packed, from.bytes, to.of) || to.of.rows != rows || to.of.columns != columns) return false;
  to.data = packed + kHeaderBytes, to.bias = from.bias;
  return true;
}

bool take(const ExpertSpec& from, int64_t width, int64_t hidden, Mlp& to) {
  to.width = width, to.is_gated = from.gate.packed;
  return (!to.is_gated || take(from.gate, width, hidden, to.gate)) && take(from.up, width, hidden, to.up) && take(from.down, hidden, width, to.down);
}

}  // namespace

class Model {
 public:
  // False where a size does not fit.
  bool open(const ModelSpec& from) {
    spec = from;
    const int64_t sizes[] = {from.num_layers, from.hidden, from.heads, from.kv_heads, from.head_dim, from.intermediate, from.vocabulary, from.max_positions};
    for (int64_t size : sizes)
      if (size < 1 || size >= int64_t(1) << 31) return false;
    if (from.heads % from.kv_heads || from.head_dim > kWidestHead || from.rotary_dim < 0 || from.rotary_dim > from.head_dim || from.rotary_dim % 2) return false;
    if (!from.layers || !from.norm || from.activation < kSilu || from.activation > kGelu) return false;
    if (from.num_experts < 0 || from.num_experts > kMaxExperts || from.experts_per_token < 0 || from.experts_per_token > from.num_experts) return false;
    if (from.num_experts && (from.experts_per_token < 1 || from.expert_intermediate < 1 || from.expert_intermediate >= int64_t(1) << 31)) return false;
    const int64_t wide = from.heads * from.head_dim, kv_wide = from.kv_heads * from.head_dim;
    for (int64_t i = 0; i < from.num_layers; ++i) {
      Layer& to = layers.emplace_back(from.layers[i]);
      const bool fits = take(to.q, wide, from.hidden, to.q_weight) && take(to.k, kv_wide, from.hidden, to.k_weight) &&
                        take(to.v, kv_wide, from.hidden, to.v_weight) && take(to.o, from.hidden, wide, to.o_weight);
      if (!fits || to.window < 0 || !to.cosines != !to.sines) return false;
      const bool is_routed = to.experts;
      if (is_routed && (!from.num_experts || !take(to.router, from.num_experts, from.hidden, to.router_weight))) return false;
      const ExpertSpec dense{to.gate, to.up, to.down};
      const ExpertSpec* const mlps = is_routed ? to.experts : &dense;
      to.mlps.resize(is_routed ? from.num_experts : 1);
      for (int64_t e = 0; e < int64_t(to.mlps.size()); ++e)
        if (!take(mlps[e], is_routed ? from.expert_intermediate : from.intermediate, from.hidden, to.mlps[e])) return false;
      (is_routed ? has_routed : has_dense) = true;
    }
    spec.layers = nullptr;
    return take(from.head, from.vocabulary, from.hidden, head) && take(from.embedding, from.vocabulary, from.hidden, embedding);
  }

  CacheLayout layout(CacheKind kind) const { return {spec.num_layers, spec.kv_heads, whole(spec.head_dim, 16), kind}; }

  ModelSpec spec{};
  std::vector<Layer> layers;
  Weight head, embedding;
  bool has_dense = false, has_routed = false;  // whether some blocks have an MLP, and some experts

  // Of the pass that runs.
  std::mutex passes;
  Buffer x, input, room, query, key, value, gate, up, added, beside, router, routed, parts, logits;
  std::vector<Own> own;
  int64_t barriers = 0;
};

struct Cache {
  const Model* model;
  CacheLayout layout;
  int64_t num_blocks;
  uint8_t* pool;
  int64_t reserved;
};

namespace {

class Pass {
 public:
  Pass(Model& model, const Cache& cache, const Sequence* sequences, int64_t count, int threads)
      : model_(model), spec_(model.spec), cache_(cache), sequences_(sequences), threads_(threads) {
    for (int64_t s = 0; s < count; ++s) {
      const Sequence& of = sequences[s];
      for (int64_t t = 0; t < of.count; ++t) {
        if ((of.position + t) % kBlockTokens == 0) new_blocks_.push_back(int64_t(rows_.size()));
        rows_.push_back({s, of.position + t, false, 0});
      }
      for (int64_t t = 0; of.logits && t < of.count; ++t)
        if (of.all_logits || t == of.count - 1)
          asked_.push_back({int64_t(rows_.size()) - of.count + t, of.logits + (of.all_logits ? t * spec_.vocabulary : 0)});
      has_prompts_ |= of.count > 1;
    }
    count_ = int64_t(rows_.size());
    group_ = spec_.heads / spec_.kv_heads;
    width_ = cache.layout.width;
    few_ = count_ <= kFewRows;
    attention_ = attention_of(cache.layout.kind);
    make_items();
    make_room(threads);
  }

  void run() {
    const auto walk = [&](Walkers& team, int64_t rank) { this->walk(team, rank); };
    model_.barriers = Team::of_process().walk(threads_, walk);
  }

 private:
  struct Row {
    int64_t sequence, position;
    bool in_prompt;  // its attention is that of a prompt
    int64_t parts;   // where its parts begin, in heads of the buffer
  };
  struct Asked {
    int64_t row;
    float* logits;
  };
  struct Item {  // of attention: tokens of a prompt from `row` on, or a part of the context of one token
    int64_t row, count, head, part;
  };
  // A thread in the walk: which rows it prepares, and where.
  struct Thread {
    Walkers& team;
    int64_t rank;
    float *x, *input;  // rows of (padded) columns
    Own& own;
    const float *pending, *pending_norm;  // what x still lacks, and the norm before it is added
    bool is_routed;                       // whether `pending` has slots, which `own.routing` tells the rows of
    uint8_t* room() const { return reinterpret_cast<uint8_t*>(own.room.data()); }
  };
  struct Product {
    const Weight& by;
    float* y;  // (rows, padded(by.of.rows))
  };
  using Products = std::initializer_list<Product>;

  int64_t heads_wide() const { return spec_.heads * spec_.head_dim; }
  int64_t part_stride() const { return width_ + kPartRest; }

  void make_items() {
    int64_t heads = 0;
    for (int64_t row = 0; row < count_;) {
      const Sequence& of = sequences_[rows_[row].sequence];
      if (of.count > kFewTokens) {
        for (int64_t t = 0; t < of.count; t += kPromptTokens)
          for (int64_t head = 0; head < spec_.kv_heads; ++head)
            items_.push_back({row + t, std::min(kPromptTokens, of.count - t), head, 0});
        for (int64_t t = 0; t < of.count; ++t) rows_[row + t].in_prompt = true;
      } else {
        for (int64_t t = 0; t < of.count; ++t) {
          const int64_t parts = rows_[row + t].position / kPartTokens + 1;
          rows_[row + t].parts = heads;
          heads += parts * spec_.heads;
          for (int64_t part = 0; part < parts; ++part)
            for (int64_t head = 0; head < spec_.kv_heads; ++head) items_.push_back({row + t, 0, head, part});
        }
      }
      row += of.count;
    }
    // Long ones first, so that no thread begins one when the others are done.
    std::stable_sort(items_.begin(), items_.end(), [&](const Item& a, const Item& b) {
      return a.count * (rows_[a.row].position + a.count) > b.count * (rows_[b.row].position + b.count);
    });
    part_heads_ = heads;
  }

  void make_room(int64_t threads) {
    const int64_t rows = whole(count_, 16), hidden = padded(spec_.hidden), inter = model_.has_dense ? padded(spec_.intermediate) : 0;
    const int64_t expert_inter = model_.has_routed ? padded(spec_.expert_intermediate) : 0, choices = model_.has_routed ? count_ * spec_.experts_per_token : 0;
    const int64_t slots = whole(choices + 15 * std::min(choices, spec_.num_experts), 16);  // at most 15 of each expert stay empty
    const int64_t wide = padded(heads_wide()), kv_wide = padded(spec_.kv_heads * spec_.head_dim), widest = std::max({hidden, inter, expert_inter, wide});
    const int64_t form = 3 * (whole(std::max(rows, kLogitRows), 16) + 16) * widest;
    query_ = model_.query.sized(rows * wide), key_ = model_.key.sized(rows * kv_wide), value_ = model_.value.sized(rows * kv_wide);
    const int64_t gates = std::max(rows * inter, slots * expert_inter);
    gate_ = model_.gate.sized(gates), up_ = model_.up.sized(gates), added_ = model_.added.sized(rows * hidden);
    beside_ = model_.beside.sized(spec_.is_parallel ? rows * hidden : 0);
    router_ = model_.router.sized(choices ? rows * padded(spec_.num_experts) : 0), routed_ = model_.routed.sized(slots * hidden);
    parts_ = model_.parts.sized(part_heads_ * part_stride());
    const int64_t asked = std::min<int64_t>(kLogitRows, asked_.size());
    logits_ = asked ? model_.logits.sized(whole(asked, 16) * padded(spec_.vocabulary)) : nullptr;
    input_ = model_.input.sized(std::max(rows, whole(asked, 16)) * widest);
    room_ = reinterpret_cast<uint8_t*>(model_.room.sized(form));
    x_ = model_.x.sized(rows * hidden);
    if (int64_t(model_.own.size()) < threads) model_.own.resize(threads);
    for (int64_t i = 0; i < threads; ++i) {
      Own& own = model_.own[i];
      const int64_t few = whole(kFewRows, 16), at_expert = choices ? std::min(rows, kExpertRows) : 0;
      own.x.sized(kFewRows * hidden), own.input.sized(few * widest), own.room.sized(3 * (std::max(few, at_expert) + 16) * widest);
      own.gathered.sized(at_expert * hidden);
      Routing& routing = own.routing;
      routing.probabilities.resize(spec_.num_experts), routing.is_taken.resize(spec_.num_experts);
      routing.expert.resize(choices), routing.share.resize(choices), routing.slot.resize(choices);
      routing.first.resize(spec_.num_experts), routing.count.resize(spec_.num_experts), routing.row.resize(slots);
    }
  }

  // ---- parts of a step

  // Calls fill(row, to) for the rows that this thread prepares, which writes a row of `input`, and brings them into the forms that
  // the weights take: all rows, for every thread.
  template <class Fill>
  void prepare(Thread& me, int64_t count, bool few, float* input, Products products, Activations* to, Fill fill) {
    const int64_t columns = products.begin()->by.of.columns, stride = padded(columns);
    const auto [first, last] = few ? std::pair<int64_t, int64_t>{0, count} : share(count, me);
    for (int64_t row = first; row < last; ++row) {
      fill(row, input + row * stride);
      std::fill(input + row * stride + columns, input + (row + 1) * stride, 0.0f);
    }
    make_forms(count, first, last, input, products, few ? me.room() : room_, to);
    if (!few) me.team.barrier();
  }

  // The forms of rows [first, last) of `count` rows of `input` for each of the weights.
  static void make_forms(int64_t count, int64_t first, int64_t last, const float* input, Products products, uint8_t* room, Activations* to) {
    const Header* before = nullptr;
    for (const Product& product : products) {
      const Header& of = product.by.of;
      if (before && same_form(of, *before)) {
        *to = to[-1];
      } else {
        const Kernel kernel = kernel_for(of, count, false);
        const int64_t filled = whole(count, kernel.multiple_of_rows);
        *to = kernel.form(of, input, filled, first, last == count ? filled : last, room);
        room += form_bytes(of, filled);
      }
      before = &of, ++to;
    }
  }

  // Rows [first, last) of `count` for a thread, in whole sixteens where there are enough.
  static std::pair<int64_t, int64_t> share(int64_t count, const Thread& me) {
    const int64_t unit = count >= 16 * me.team.size() ? 16 : 1, units = (count + unit - 1) / unit;
    return {std::min(count, units * me.rank / me.team.size() * unit), std::min(count, units * (me.rank + 1) / me.team.size() * unit)};
  }

  // This thread's share of the outputs of all products, seen as one row of outputs; with `same_rows` the same rows of each. Calls
  // done(product, first, last) for the rows of a weight that it has multiplied.
  template <class Done>
  void multiply(const Thread& me, int64_t count, Products products, const Activations* forms, bool same_rows, Done done) {
    int64_t unit = 16, units = 0;
    for (const Product& product : products)
      unit = std::max(unit, product.by.of.tile_rows() * kernel_for(product.by.of, count, false).multiple_of_tiles);
    for (const Product& product : products) units = (same_rows ? 0 : units) + (product.by.of.rows + unit - 1) / unit;
    const int64_t begin = units * me.rank / me.team.size(), end = units * (me.rank + 1) / me.team.size();
    int64_t base = 0;
    for (const Product& product : products) {
      const Header& of = product.by.of;
      const int64_t here = (of.rows + unit - 1) / unit;
      const int64_t first = std::max<int64_t>(0, begin - base) * unit, last = std::min(of.rows, std::min(here, end - base) * unit);
      if (first < last) {
        const int64_t ldy = padded(of.rows), tile_rows = of.tile_rows();
        kernel_for(of, count, false).multiply(of, product.by.data, *forms, product.y, ldy, first / tile_rows, (last + tile_rows - 1) / tile_rows);
        for (int64_t row = 0; product.by.bias && row < count; ++row)
          add_scaled(product.y + row * ldy + first, product.by.bias + first, 1, last - first);
        done(product, first, last);
      }
      if (!same_rows) base += here;
      ++forms;
    }
  }

  // Writes a row of x with what it lacks to `to`.
  void complete(const Thread& me, int64_t row, float* to) const {
    const int64_t at = row * padded(spec_.hidden);
    if (!me.pending) return void(std::copy_n(me.x + at, spec_.hidden, to));
    const float* pending = me.pending + at;
    if (me.is_routed) {
      const Routing& of = me.own.routing;
      std::fill_n(to, spec_.hidden, 0.0f);
      for (int64_t j = row * spec_.experts_per_token; j < (row + 1) * spec_.experts_per_token; ++j)
        add_scaled(to, me.pending + of.slot[j] * padded(spec_.hidden), of.share[j], spec_.hidden);
      pending = to;
    }
    norm(pending, me.pending_norm, to);
    add_to_scaled(me.x + at, spec_.residual_scale, spec_.hidden, to);
  }

  void norm(const float* x, const float* weight, float* to) const {
    if (weight && spec_.layer_norms) layer_norm(x, weight, weight + spec_.hidden, spec_.hidden, spec_.epsilon, to);
    else rms_norm(x, weight, spec_.hidden, spec_.epsilon, to);
  }

  // ---- attention

  HeadBlocks blocks_of(int64_t layer, int64_t row, int64_t head) const {
    const CacheLayout& of = cache_.layout;
    return {cache_.pool + (layer * of.heads + head) * of.head_bytes(), sequences_[rows_[row].sequence].blocks, of.block_bytes(), of.half_bytes(), of.width, of.kind};
  }

  // Norm and rotary embedding of `count` heads from head `first` on of a row that has `heads`, to `to` (count, stride).
  void place(const Layer& layer, const float* from, int64_t heads, int64_t first, int64_t count, const float* norm, int64_t position, float* to, int64_t stride) const {
    const int64_t dim = spec_.head_dim, half = spec_.rotary_dim / 2;
    float factor = 0;
    if (norm && spec_.wide_head_norms) factor = 1.0f / std::sqrt(dot(from, from, heads * dim) / float(heads * dim) + spec_.epsilon);
    for (int64_t h = 0; h < count; ++h, to += stride) {
      const float* const head = from + (first + h) * dim;
      if (factor) for (int64_t i = 0; i < dim; ++i) to[i] = norm[(first + h) * dim + i] * (head[i] * factor);
      else rms_norm(head, norm, dim, spec_.epsilon, to);
      if (layer.cosines) rotate(to, layer.cosines + position * half, layer.sines + position * half, half);
    }
  }

  void put_key(int64_t layer, int64_t row, int64_t head) const {
    const int64_t dim = spec_.head_dim, stride = padded(spec_.kv_heads * dim), position = rows_[row].position;
    alignas(64) float key[kWidestHead] = {}, value[kWidestHead] = {};
    const Layer& of = model_.layers[layer];
    place(of, key_ + row * stride, spec_.kv_heads, head, 1, of.k_norm, position, key, 0);
    std::copy_n(value_ + row * stride + head * dim, dim, value);
    put_position(blocks_of(layer, row, head), position, key, value);
  }

  int64_t first_position(const Layer& of, int64_t position) const { return of.window ? std::max<int64_t>(0, position + 1 - of.window) : 0; }

  // `next`: the item that this thread takes next, most likely.
  void attend(int64_t layer, const Item& item, const Item& next) const {
    const Layer& of = model_.layers[layer];
    const int64_t dim = spec_.head_dim, stride = padded(heads_wide()), position = rows_[item.row].position;
    if (item.count) {
      const int64_t at = item.head * group_ * dim, sequence = rows_[item.row].sequence, start = sequences_[sequence].position;
      const int64_t row = item.row - (position - start);  // the first of the sequence
      const Prompt prompt{blocks_of(layer, row, item.head), query_ + row * stride + at, input_ + row * stride + at, stride, group_, dim, start, of.window,
                          spec_.attention_scale * kLog2E};
      return attention_.prompt(prompt, position - start, item.count);
    }
    const int64_t first = std::max(first_position(of, position), item.part * kPartTokens), last = std::min(position + 1, (item.part + 1) * kPartTokens);
    if (last == position + 1 && !has_prompts_) put_key(layer, item.row, item.head);
    if (first >= last) return;
    alignas(64) float queries[kMostGroup * kWidestHead];
    const float* const from = query_ + item.row * stride;
    for (int64_t g = 0; g < group_; g += kMostGroup) {
      const int64_t count = std::min(kMostGroup, group_ - g), head = item.head * group_ + g;
      std::fill_n(queries, count * width_, 0.0f);
      if (has_prompts_) for (int64_t h = 0; h < count; ++h) std::copy_n(from + (head + h) * dim, dim, queries + h * width_);
      else place(of, from, spec_.heads, head, count, of.q_norm, position, queries, width_);
      scale_by(queries, spec_.attention_scale * kLog2E, count * width_);
      float* const to = parts_ + (rows_[item.row].parts + item.part * spec_.heads + head) * part_stride();
      attention_.part({blocks_of(layer, item.row, item.head), first, last, count, queries, to,
                       blocks_of(layer, next.row, next.head).at(std::max(next.part * kPartTokens, first_position(of, rows_[next.row].position)))});
    }
  }
  static constexpr int64_t kMostGroup = 16;

  // The attention output of a row, (heads, head_dim), from its parts; that of a prompt is there already.
  void gather_heads(const Layer& of, int64_t row, float* to) const {
    if (rows_[row].in_prompt) return;
    const int64_t position = rows_[row].position, first = first_position(of, position) / kPartTokens, last = position / kPartTokens + 1;
    alignas(64) float head[kWidestHead];
    for (int64_t h = 0; h < spec_.heads; ++h) {
      combine(parts_ + (rows_[row].parts + first * spec_.heads + h) * part_stride(), last - first, spec_.heads * part_stride(), width_, head);
      std::copy_n(head, spec_.head_dim, to + h * spec_.head_dim);
    }
  }

  // ---- the walk

  void walk(Walkers& team, int64_t rank) {
    Own& own = model_.own[rank];
    const int64_t hidden = padded(spec_.hidden);
    float* const x = few_ ? own.x.data() : x_;
    Thread me{team, rank, x, few_ ? own.input.data() : input_, own, nullptr, nullptr, false};
    const auto [first, last] = few_ ? std::pair<int64_t, int64_t>{0, count_} : share(count_, me);
    for (int64_t row = first; row < last; ++row) {
      const Sequence& of = sequences_[rows_[row].sequence];
      gather_row(model_.embedding.of, model_.embedding.data, of.tokens[rows_[row].position - of.position], x + row * hidden);
      if (spec_.embedding_scale != 1) scale_by(x + row * hidden, spec_.embedding_scale, spec_.hidden);
    }
    for (int64_t i = 0; i < spec_.num_layers; ++i) step_through(me, i);
    write_logits(me);
  }

  void step_through(Thread& me, int64_t index) {
    const Layer& of = model_.layers[index];
    const auto nothing = [](const Product&, int64_t, int64_t) {};
    const auto normed = [&](const float* norm) {
      return [&, norm](int64_t row, float* to) {
        complete(me, row, to);
        if (me.pending) std::copy_n(to, spec_.hidden, me.x + row * padded(spec_.hidden));
        this->norm(to, norm, to);
      };
    };
    Activations forms[3];

    const Products qkv = {{of.q_weight, query_}, {of.k_weight, key_}, {of.v_weight, value_}};
    prepare(me, count_, few_, me.input, qkv, forms, normed(of.attention_norm));
    me.pending = nullptr;
    multiply(me, count_, qkv, forms, false, nothing);
    const auto [new_first, new_last] = share(int64_t(new_blocks_.size()), me);
    for (int64_t i = new_first; i < new_last; ++i)
      for (int64_t head = 0; head < spec_.kv_heads; ++head) clear_values(blocks_of(index, new_blocks_[i], head), rows_[new_blocks_[i]].position);
    me.team.barrier();

    std::atomic<int64_t>& next = next_item_[index % 2];
    if (me.rank == 0) next_item_[1 - index % 2].store(0, std::memory_order_relaxed);
    if (has_prompts_) place_all(me, index);
    const int64_t items = int64_t(items_.size());
    for (int64_t i = next.fetch_add(1); i < items; i = next.fetch_add(1))
      attend(index, items_[i], items_[std::min(i + me.team.size(), items - 1)]);
    me.team.barrier();

    const Products o = {{of.o_weight, added_}};
    prepare(me, count_, few_, me.input, o, forms, [&](int64_t row, float* to) { gather_heads(of, row, to); });
    multiply(me, count_, o, forms, false, nothing);
    me.team.barrier();
    me.is_routed = false;
    if (!spec_.is_parallel) me.pending = added_, me.pending_norm = of.post_attention_norm;

    if (of.experts) step_through_experts(me, of, normed(of.mlp_norm));
    else step_through_mlp(me, of.mlps[0], normed(of.mlp_norm));
    me.pending_norm = of.post_mlp_norm;
  }

  template <class Fill>
  void step_through_mlp(Thread& me, const Mlp& by, Fill normed) {
    Activations forms[2];
    with_up(by, 0, [&](Products up) {
      prepare(me, count_, few_, me.input, up, forms, normed);
      multiply_up(me, count_, by, 0, up, forms);
    });
    me.team.barrier();

    const Products down = {{by.down, spec_.is_parallel ? beside_ : added_}};
    prepare(me, count_, few_, gate_, down, forms, [](int64_t, float*) {});
    multiply(me, count_, down, forms, false, [&](const Product&, int64_t first, int64_t last) {
      if (!spec_.is_parallel) return;
      for (int64_t row = 0; row < count_; ++row) {
        const int64_t at = row * padded(spec_.hidden) + first;
        add_scaled(added_ + at, beside_ + at, 1, last - first);
      }
    });
    me.team.barrier();
    me.pending = added_;
  }

  // Calls step(products) with the products of gate and up, whose rows go to those of `gate_` and `up_` from `row` on; without a gate,
  // those of up go to `gate_`.
  template <class Step>
  void with_up(const Mlp& by, int64_t row, Step step) {
    const int64_t at = row * padded(by.width);
    if (by.is_gated) step({{by.gate, gate_ + at}, {by.up, up_ + at}});
    else step({{by.up, gate_ + at}});
  }

  void multiply_up(const Thread& me, int64_t count, const Mlp& by, int64_t row, Products up, const Activations* forms) {
    const Product& last_one = *(up.end() - 1);
    multiply(me, count, up, forms, true, [&](const Product& product, int64_t first, int64_t last) {
      if (product.y != last_one.y) return;
      const Activate activate = activation_of(spec_.activation);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (row + i) * padded(by.width) + first;
        activate(gate_ + at, by.is_gated ? up_ + at : nullptr, last - first);
      }
    });
  }

  // ---- experts

  template <class Fill>
  void step_through_experts(Thread& me, const Layer& of, Fill normed) {
    const int64_t hidden = padded(spec_.hidden);
    Activations forms[2];
    const Products router = {{of.router_weight, router_}};
    prepare(me, count_, few_, me.input, router, forms, normed);
    multiply(me, count_, router, forms, false, [](const Product&, int64_t, int64_t) {});
    me.team.barrier();

    Routing& routing = me.own.routing;
    choose(routing);
    float* const gathered = me.own.gathered.data();
    for_each_expert(me, routing, [&](const Thread& turned, int64_t expert, int64_t slot, int64_t count) {
      for (int64_t i = 0; i < count; ++i) std::copy_n(me.input + routing.row[slot + i] * hidden, hidden, gathered + i * hidden);
      const Mlp& by = of.mlps[expert];
      with_up(by, slot, [&](Products up) {
        make_forms(count, 0, count, gathered, up, me.room(), forms);
        multiply_up(turned, count, by, slot, up, forms);
      });
    });
    me.team.barrier();

    for_each_expert(me, routing, [&](const Thread& turned, int64_t expert, int64_t slot, int64_t count) {
      const Mlp& by = of.mlps[expert];
      const Products down = {{by.down, routed_ + slot * hidden}};
      make_forms(count, 0, count, gate_ + slot * padded(by.width), down, me.room(), forms);
      multiply(turned, count, down, forms, false, [](const Product&, int64_t, int64_t) {});
    });
    me.team.barrier();
    me.pending = routed_, me.is_routed = true;
  }

  // Calls step(turned, expert, first slot, number of slots) for the experts that rows have chosen, up to `kExpertRows` rows at a time.
  // `turned` is this thread with another rank for each expert: a share of the tiles of one may be larger than the next thread's.
  template <class Step>
  void for_each_expert(const Thread& me, const Routing& routing, Step step) {
    Thread turned = me;
    for (int64_t expert = 0; expert < spec_.num_experts; ++expert)
      for (int64_t done = 0; done < routing.count[expert]; done += kExpertRows) {
        step(turned, expert, routing.first[expert] + done, std::min(kExpertRows, routing.count[expert] - done));
        turned.rank = (turned.rank + 1) % me.team.size();
      }
  }

  // The experts of all rows, by the products of the router: the most probable ones, the first one of equals.
  void choose(Routing& to) const {
    const int64_t experts = spec_.num_experts, each = spec_.experts_per_token;
    std::fill_n(to.count.data(), experts, 0);
    for (int64_t row = 0; row < count_; ++row) {
      float* const p = to.probabilities.data();
      softmax(router_ + row * padded(experts), experts, p);
      std::fill_n(to.is_taken.data(), experts, 0);
      float sum = 0;
      for (int64_t j = row * each; j < (row + 1) * each; ++j) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; ++e)
          if (!to.is_taken[e] && (best < 0 || !(p[e] <= p[best]))) best = e;  // NaN is taken
        to.is_taken[best] = 1, to.expert[j] = int32_t(best), to.share[j] = p[best], sum += p[best];
        to.slot[j] = to.count[best]++;  // among those of its expert
      }
      for (int64_t j = row * each; spec_.normalizes_experts && j < (row + 1) * each; ++j) to.share[j] /= sum;
    }
    for (int64_t expert = 0, slots = 0; expert < experts; slots += whole(to.count[expert++], 16)) to.first[expert] = slots;
    for (int64_t j = 0; j < count_ * each; ++j) {
      to.slot[j] += to.first[to.expert[j]];
      to.row[to.slot[j]] = j / each;
    }
  }

  // Puts the keys of all rows into the cache, and their queries in place.
  void place_all(Thread& me, int64_t index) {
    const Layer& of = model_.layers[index];
    const int64_t dim = spec_.head_dim, stride = padded(heads_wide());
    const auto [first, last] = share(count_, me);
    for (int64_t row = first; row < last; ++row) {
      float* const query = query_ + row * stride;
      if (of.q_norm && spec_.wide_head_norms) {
        const float factor = 1.0f / std::sqrt(dot(query, query, heads_wide()) / float(heads_wide()) + spec_.epsilon);
        for (int64_t i = 0; i < heads_wide(); ++i) query[i] = of.q_norm[i] * (query[i] * factor);
        place(of, query, spec_.heads, 0, spec_.heads, nullptr, rows_[row].position, query, dim);
      } else {
        place(of, query, spec_.heads, 0, spec_.heads, of.q_norm, rows_[row].position, query, dim);
      }
      for (int64_t head = 0; head < spec_.kv_heads; ++head) put_key(index, row, head);
    }
    me.team.barrier();
  }

  void write_logits(Thread& me) {
    const int64_t ldy = padded(spec_.vocabulary);
    for (int64_t begin = 0; begin < int64_t(asked_.size()); begin += kLogitRows) {
      const int64_t count = std::min<int64_t>(kLogitRows, asked_.size() - begin);
      const bool few = count <= kFewRows;
      if (begin) me.team.barrier();  // all have read the rows before
      Activations form;
      const Products head = {{model_.head, logits_}};
      prepare(me, count, few, few ? model_.own[me.rank].input.data() : input_, head, &form, [&](int64_t j, float* to) {
        complete(me, asked_[begin + j].row, to);
        norm(to, spec_.norm, to);
      });
      multiply(me, count, head, &form, false, [&](const Product&, int64_t first, int64_t last) {
        for (int64_t j = 0; j < count; ++j) {
          float* const to = asked_[begin + j].logits + first;
          std::copy_n(logits_ + j * ldy + first, last - first, to);
          if (spec_.logit_scale != 1) scale_by(to, spec_.logit_scale, last - first);
          for (int64_t i = 0; spec_.logit_cap > 0 && i < last - first; ++i) to[i] = spec_.logit_cap * std::tanh(to[i] / spec_.logit_cap);
        }
      });
    }
  }

  Model& model_;
  const ModelSpec& spec_;
  const Cache& cache_;
  const Sequence* const sequences_;
  const int threads_;
  std::vector<Row> rows_;
  std::vector<Asked> asked_;
  std::vector<Item> items_;
  std::vector<int64_t> new_blocks_;  // rows that are the first of a block
  int64_t count_ = 0, group_ = 1, width_ = 0, part_heads_ = 0;
  bool few_ = false, has_prompts_ = false;
  Attention attention_{};
  std::atomic<int64_t> next_item_[2] = {};
  float *x_, *input_, *query_, *key_, *value_, *gate_, *up_, *added_, *beside_, *router_, *routed_, *parts_, *logits_;
  uint8_t* room_;
};

bool fits(const Model& model, const Cache& cache, const Sequence& of) {
  if (of.count < 1 || of.position < 0 || !of.tokens || !of.blocks) return false;
  if (of.position > model.spec.max_positions || of.count > model.spec.max_positions - of.position) return false;
  for (int64_t t = 0; t < of.count; ++t)
    if (of.tokens[t] < 0 || of.tokens[t] >= model.spec.vocabulary) return false;
  for (int64_t b = 0; b < (of.position + of.count + kBlockTokens - 1) / kBlockTokens; ++b)
    if (of.blocks[b] < 0 || of.blocks[b] >= cache.num_blocks) return false;
  return true;
}

constexpr int64_t kHugePage = 1 << 21;

}  // namespace
}  // namespace castlm

using namespace castlm;

extern "C" {

int castlm_model_new(const ModelSpec* spec, void** model) {
  return guarded([&] {
    auto made = std::make_unique<Model>();
    if (!made->open(*spec)) return kBadSize;
    *model = made.release();
    return kOk;
  });
}

void castlm_model_free(void* model) { delete static_cast<Model*>(model); }

int64_t castlm_model_barriers(void* model) { return static_cast<Model*>(model)->barriers; }

int64_t castlm_cache_block_bytes(void* model, int kind) {
  if (kind < kCacheBFloat16 || kind > kCacheFloat32) return -1;
  return static_cast<Model*>(model)->layout(CacheKind(kind)).block_bytes();
}

int castlm_cache_new(void* model, int kind, int64_t num_blocks, void** cache) {
  const int64_t block_bytes = castlm_cache_block_bytes(model, kind);
  if (block_bytes < 0 || num_blocks < 1 || num_blocks > (int64_t(1) << 46) / block_bytes || num_blocks >= int64_t(1) << 31) return kBadSize;
  return guarded([&] {
    const int64_t reserved = block_bytes * num_blocks + kHugePage;
    auto made = std::make_unique<Cache>();
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
    flags |= MAP_NORESERVE;
#endif
    void* const pool = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (pool == MAP_FAILED) return kNoMemory;
#if defined(MADV_HUGEPAGE)
    madvise(pool, reserved, MADV_HUGEPAGE);  // a refusal only costs speed
#endif
    const auto* const owner = static_cast<Model*>(model);
    *made = {owner, owner->layout(CacheKind(kind)), num_blocks, static_cast<uint8_t*>(pool), reserved};
    *cache = made.release();
    return kOk;
  });
}

void castlm_cache_free(void* cache) {
  auto* const of = static_cast<Cache*>(cache);
  if (!of) return;
  munmap(of->pool, of->reserved);
  delete of;
}

void castlm_cache_release(void* cache, const int32_t* blocks, int64_t count) {
  const auto& of = *static_cast<Cache*>(cache);
  const int64_t bytes = of.layout.block_bytes(), page = 4096;
  for (int64_t i = 0; i < count; ++i) {
    if (blocks[i] < 0 || blocks[i] >= of.num_blocks) continue;
    const int64_t first = whole(blocks[i] * bytes, page), last = (blocks[i] + 1) * bytes / page * page;
    if (first < last) madvise(of.pool + first, last - first, MADV_DONTNEED);
  }
}

int castlm_forward(void* model, void* cache, const Sequence* sequences, int64_t count, int threads) {
  auto& of = *static_cast<Model*>(model);
  const auto& blocks = *static_cast<Cache*>(cache);
  if (count < 1 || blocks.model != &of) return kBadSize;
  int64_t rows = 0;
  for (int64_t s = 0; s < count; ++s) {
    if (!fits(of, blocks, sequences[s])) return kBadSize;
    if ((rows += sequences[s].count) > 1 << 20) return kBadSize;
  }
  return guarded([&] {
    const std::lock_guard<std::mutex> one(of.passes);
    if (rows == 1) release_large_scratch();
    Pass(of, blocks, sequences, count, std::max(1, threads)).run();
    return kOk;
  });
}
}
