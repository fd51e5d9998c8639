// Tables for the expansion of kLanes by shuffles of 16 bytes, which AVX2 and NEON both have: a byte beyond 127 in a control gives 0.

#pragma once

#include <cstdint>

namespace castlm {

// Made when the library is loaded, by any processor, and so not compiled for a level.
//
// The control for the mask of 16 columns of a byte each is the sum of `low` of the first byte of the mask and `high` of the second.
// `low[byte][8]` is the number of bits.
struct LaneTables {
  alignas(64) uint8_t low[256][16], high[256][16];
  alignas(64) uint8_t words[256][16];   // for eight columns of 2 bytes
  alignas(64) uint8_t singles[16][16];  // for four columns of 4 bytes
  LaneTables() {
    for (int byte = 0; byte < 256; byte++)
      for (int column = 0, next = 0; column < 8; column++) {
        const bool kept = byte >> column & 1;
        low[byte][column] = high[byte][8 + column] = kept ? uint8_t(next) : 0x80;
        low[byte][8 + column] = uint8_t(__builtin_popcount(byte)), high[byte][column] = 0;
        for (int i = 0; i < 2; i++) words[byte][2 * column + i] = kept ? uint8_t(2 * next + i) : 0x80;
        if (byte < 16 && column < 4)
          for (int i = 0; i < 4; i++) singles[byte][4 * column + i] = kept ? uint8_t(4 * next + i) : 0x80;
        next += kept;
      }
  }
};

}  // namespace castlm
