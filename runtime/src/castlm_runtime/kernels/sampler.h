// The choice of the next token from the logits of the model.
//
// A row of logits goes through the steps of transformers' processors, in their order:
//
//   1. tokens that a grammar does not allow get -inf
//   2. logit += bias
//   3. repetition penalty r, of tokens of prompt or answer: logit = logit < 0 ? logit * r : logit / r
//   4. logit -= presence + frequency * count, of tokens of the answer
//   5. logit / temperature; a temperature below 1e-6 takes the largest logit, the first one of equals
//   6. top_k: those as large as the k-th largest
//   7. top_p: of these the fewest, largest first, whose probabilities sum up to top_p; at least one
//   8. min_p: those with at least min_p times the largest probability
//   9. one of them, by its probability
//
// Steps 6 to 8 keep the tokens from some logit on. So nothing is sorted but the few around that logit: one pass over the row finds the
// largest logit of each chunk of 64 tokens, and the k-th largest of these is at most the k-th largest of all, so that nearly all chunks
// are skipped from then on. For top_p, passes with seven thresholds at a time narrow down where the sum is reached.
//
// The random number is Philox4x64-10 of the key (seed, 0) and the counter (position, 0, 0, 0) [1]: the sample depends on seed, position
// and logits alone, whatever else is in the batch and however many threads there are.
//
// [1] Salmon, Moraes, Dror and Shaw. Parallel random numbers: as easy as 1, 2, 3. SC 2011.

#pragma once

#include <cstdint>

namespace castlm {

// How one row is sampled.
struct SampleSpec {
  uint64_t seed;
  int64_t position;             // of the new token: the tokens before it
  const int32_t* history;       // (num_history,): prompt and answer, for steps 3 and 4
  const int32_t* bias_tokens;   // (num_biases,)
  const float* biases;          // (num_biases,)
  const uint32_t* allowed;      // a bit for each token, the lowest one first; null allows all
  int64_t num_history;
  int64_t num_prompt;           // tokens of the history that belong to the prompt
  int64_t num_biases;
  float temperature;
  float top_p;                  // 1: all
  float min_p;                  // 0: all
  float repetition;             // 1: none
  float presence, frequency;    // 0: none
  int32_t top_k;                // 0, or more than there are tokens: all
  int32_t num_best;             // log probabilities of the most probable tokens; -1: not even that of the chosen one
  int32_t given;                // the token that is there already and whose log probability is wanted; -1: choose one
};

constexpr int kThresholds = 7;

// How the loops over a row are compiled for a processor. `count` logits or weights; a chunk has 64 of them, and a last one that is not
// whole is filled up with -inf. Weights are exp((x - max) * inverse_temperature), their arrays are padded to whole chunks.
struct SamplerLoops {
  // The largest logit of each chunk; false where one is NaN or +inf.
  bool (*maxima)(const float* x, int64_t count, float* maxima);
  // All weights, the sums of each chunk; returns the sum of all.
  double (*weigh)(const float* x, int64_t count, float max, float inverse_temperature, float* weights, float* sums);
  // The sums of each chunk of the weights whose logits are `least` or more; returns the sum of all.
  double (*sums_from)(const float* x, const float* weights, int64_t count, const float* maxima, float least, float* sums);
  // As `sums_from` the sums of all, for thresholds that rise.
  void (*masses)(const float* x, const float* weights, int64_t count, const float* maxima, const float (&thresholds)[kThresholds],
                 double (&masses)[kThresholds]);
  // How many logits are from `least` on and below `below`.
  int64_t (*count_between)(const float* x, int64_t count, const float* maxima, float least, float below);
  // The indices of logits from `least` on and below `below`, in order; returns how many.
  int64_t (*collect)(const float* x, int64_t count, const float* maxima, float least, float below, int32_t* indices);
  // to[i] = the logit of an allowed token, -inf of another one.
  void (*allow)(const float* x, int64_t count, const uint32_t* allowed, float* to);
};

}  // namespace castlm
