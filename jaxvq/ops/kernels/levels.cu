// x @ w for a row or two of x and codes that stand for evenly spaced levels, by the integer matrix units.
//
// Codes are multiplied as they are. Every value of x is split into three digits of 7 bits, in columns of their own,
// whose products and sums are exact; they lose some where all of x is below 1e-32. A row of ones gives the sum of x,
// which the zero point multiplies.
//
// A lane of a warp belongs to quad lane % 4 and row lane / 4. It holds COLUMNS neighbouring outputs. The four quads
// take turns along the input side: each reads whole units, the fewest words that end where eight codes end. The K_WARPS
// of a block share the input side; each scales x by the largest value in its own part. They add up in a fixed order.
//
// Compiled with: ROWS of x (1 or 2), INPUTS, OUTPUTS, LENGTH (codes along the input side), BITS, BFLOAT (16-bit type of
// x); G_BLOCKS, OUT_BLOCKS of the zero points; SCALES, ZEROS (types, 0 for none); SCALE_G, SCALE_OUT (blocks of
// scales); COLUMNS, K_WARPS, SPAN (turns on their way), BLOCKS (at once on a processor).

#include "codes.cuh"

constexpr int OCTETS = UNIT_CODES / 8;
static_assert(LANES == 8 && OUT_WARPS == 1, "rows of a product of tiles; all warps of a block share its outputs");
// The input side is dealt out in whole groups, or else in as many turns of the four quads as are on their way.
constexpr int TURNS = (UNITS + 3) / 4, PART_TURNS = GROUPED ? GROUP_CODES / UNIT_CODES / 4 : SPAN;
constexpr int PARTS = (TURNS + PART_TURNS - 1) / PART_TURNS, PARTS_MOST = (PARTS + K_WARPS - 1) / K_WARPS;
constexpr int TURN_CODES = 4 * UNIT_CODES, MY_TURNS = PARTS_MOST * PART_TURNS, MY_CODES = MY_TURNS * TURN_CODES;
constexpr int X_STRIDE = MY_CODES + 32;          // bytes; the digits of x then lie in different banks
constexpr int X_READS = (MY_CODES + 255) / 256;  // of eight values by each lane
constexpr bool EXACT = LENGTH == INPUTS && UNITS * UNIT_CODES == LENGTH && UNITS % (4 * PART_TURNS * K_WARPS) == 0;
constexpr long long NEXT_PART = ((K_WARPS - 1) * PART_TURNS + SPAN) * NEXT_TURN;  // words to a warp's next part
static_assert(PART_TURNS % SPAN == 0, "a group must end where a span ends");

__device__ __forceinline__ void multiply(int (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, uint2 b) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}

__device__ __forceinline__ uint2 codes_as_bytes(const unsigned (&words)[UNIT_WORDS], int octet) {
  if constexpr (BITS == 8) return make_uint2(words[octet * 2], words[octet * 2 + 1]);
  if constexpr (BITS <= 4) {
    const unsigned t = nibbles(words, octet), even = t & 0x0f0f0f0f, odd = t >> 4 & 0x0f0f0f0f;
    return make_uint2(permuted(even, odd, 0x5140), permuted(even, odd, 0x7362));
  }
  unsigned bytes[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = octet * 8 * BITS + half * 4 * BITS, i = at / 32, begin = at % 32;
    const unsigned t = begin + 4 * BITS > 32 ? __funnelshift_r(words[i], words[i + 1], begin) : words[i] >> begin;
    constexpr unsigned MASK = (1u << BITS) - 1;
    bytes[half] = (t & MASK) | (t << (8 - BITS) & MASK << 8) | (t << 2 * (8 - BITS) & MASK << 16) |
                  (t << 3 * (8 - BITS) & MASK << 24);
  }
  return make_uint2(bytes[0], bytes[1]);
}

// What a step of a code is worth, and what the code zero is, of an output.
__device__ __forceinline__ float2 read_levels(const Decoder& decoder, int group, int out) {
  const float step = decoder.scale(group, out);
  return make_float2(step, -step * decoder.zero(group, out));
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    levels(const unsigned short* __restrict__ x, const unsigned* __restrict__ words, const void* __restrict__ vectors,
           const void* __restrict__ scales, const void* __restrict__ zeros, unsigned short* __restrict__ y) {
  SHARED_MEMORY;
  const Decoder decoder{vectors, scales, zeros};
  const int lane = threadIdx.x % 32, quad = lane % 4, row = lane / 4, warp = threadIdx.x / 32;
  // Levels of this block of outputs and the next, or those of each warp; sums of the warps, twice; digits of x.
  constexpr int TABLES = (GROUPED ? K_WARPS : 2) * OUTS, SUMS = K_WARPS * ROWS * OUTS;
  float2* shared_levels = reinterpret_cast<float2*>(memory);
  float* shared_sums = reinterpret_cast<float*>(memory + 8 * TABLES);
  unsigned char* digits = memory + 8 * (TABLES + SUMS) + warp * 3 * ROWS * X_STRIDE;

  // Beyond the outputs and the input side any code may be read: there x counts as zero and nobody asks for the sum.
  auto turn_of = [&](int mine) { return (mine / PART_TURNS * K_WARPS + warp) * PART_TURNS + mine % PART_TURNS; };
  unsigned codes[SPAN][UNIT_WORDS][COLUMNS];
  auto start_of = [&](int block) { return unit_at(words, turn_of(0) * 4 + quad, block * OUTS + row * COLUMNS); };
  const unsigned* from = start_of(blockIdx.x);
  auto read = [&](int s, int mine, int block) {
    read_unit<EXACT>(codes[s], from + s * NEXT_TURN, EXACT ? 0 : turn_of(mine + s) * 4 + quad,
                     block * OUTS + row * COLUMNS);
  };
#pragma unroll
  for (int s = 0; s < SPAN; ++s) read(s, 0, blockIdx.x);

  // The part of x that this warp multiplies, as digits from -64 to 64, the first to 127: up to 2,080,767 units.
  uint4 my_x[ROWS][X_READS];
#pragma unroll
  for (int n = 0; n < ROWS; ++n)
#pragma unroll
    for (int i = 0; i < X_READS; ++i) {
      const int mine = i * 256 + lane * 8, at = turn_of(mine / TURN_CODES) * TURN_CODES + mine % TURN_CODES;
      my_x[n][i] = mine < MY_CODES ? eight_inputs<EXACT>(x, n, at) : make_uint4(0, 0, 0, 0);
    }
  static_assert(GROUPED || OUTS <= THREADS, "a thread reads the levels of an output");
  float2 my_levels;
  auto read_mine = [&](int block) {
    if (threadIdx.x < OUTS) my_levels = read_levels(decoder, 0, block * OUTS + threadIdx.x);
  };
  if constexpr (!GROUPED) read_mine(blockIdx.x);

  float unit_of_x[ROWS];
  int sum_of_x[ROWS][3] = {};
#pragma unroll
  for (int n = 0; n < ROWS; ++n) {
    const float size = largest(my_x[n]);
    const float inverse = size > 0 ? fminf(2080000.f / size, 3e38f) : 0;
    unit_of_x[n] = size > 0 ? 1 / inverse : size * 0;  // NaN for NaN
#pragma unroll
    for (int i = 0; i < X_READS; ++i) {
      const unsigned* two = reinterpret_cast<const unsigned*>(&my_x[n][i]);
      unsigned bytes[3][2] = {};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int whole = __float2int_rn(x_value((unsigned short)(two[j / 2] >> (j % 2 * 16))) * inverse);
        const int upper = (whole + 64) >> 7, first = (upper + 64) >> 7;
        const int parts[3] = {first, upper - (first << 7), whole - (upper << 7)};
#pragma unroll
        for (int p = 0; p < 3; ++p) {
          bytes[p][j / 4] |= (unsigned)(parts[p] & 255) << (j % 4 * 8);
          sum_of_x[n][p] += parts[p];
        }
      }
#pragma unroll
      for (int p = 0; p < 3; ++p)
        if (i * 256 + lane * 8 < MY_CODES)
          *reinterpret_cast<uint2*>(digits + (n * 3 + p) * X_STRIDE + i * 256 + lane * 8) =
              make_uint2(bytes[p][0], bytes[p][1]);
    }
  }
  // This lane's columns of a product are digits 2 * quad % 4 and the next of row quad / 2 of x.
  const int my_row = min(quad / 2, ROWS - 1);
  float ones[2] = {};
  if constexpr (!GROUPED) {
    int sums[ROWS][3];
#pragma unroll
    for (int n = 0; n < ROWS; ++n)
#pragma unroll
      for (int p = 0; p < 3; ++p) sums[n][p] = __reduce_add_sync(~0u, sum_of_x[n][p]);
    const int n = ROWS - 1;
    ones[0] = quad % 2 == 0 ? (my_row == n ? sums[n][0] : sums[0][0]) : (my_row == n ? sums[n][2] : sums[0][2]);
    ones[1] = quad % 2 == 0 ? (my_row == n ? sums[n][1] : sums[0][1]) : 0;
    if (threadIdx.x < OUTS) shared_levels[threadIdx.x] = my_levels;
    __syncthreads();
  } else {
    __syncwarp();
  }

  constexpr int TILES = (COLUMNS + 1) / 2;
  float totals[TILES][4];
  int sums[TILES][4], sums_of_x[4];
  auto start = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums_of_x[i] = 0;
#pragma unroll
      for (int t = 0; t < TILES; ++t) sums[t][i] = 0;
    }
  };
  auto add_up = [&](const float2* levels_here) {
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 2 * t + i / 2;
        if (c < COLUMNS) {
          const float2 levels = levels_here[row * COLUMNS + c];
          totals[t][i] += levels.x * sums[t][i] + levels.y * (GROUPED ? (float)sums_of_x[i % 2] : ones[i % 2]);
        }
      }
  };
  const unsigned char* my_digits =
      digits + (min(row / 4, ROWS - 1) * 3 + min(row % 4, 2)) * X_STRIDE + quad * UNIT_CODES;

  auto use = [&](const unsigned char* my_x, const unsigned (&from)[UNIT_WORDS][COLUMNS]) {
#pragma unroll
    for (int octet = 0; octet < OCTETS; ++octet) {
      const uint2 b = *reinterpret_cast<const uint2*>(my_x + octet * 8);
      if constexpr (GROUPED) multiply(sums_of_x, 0x01010101, 0x01010101, 0x01010101, 0x01010101, b);
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        uint2 a[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int c = 2 * t + i;
          if (c < COLUMNS) {
            unsigned mine_of[UNIT_WORDS];
#pragma unroll
            for (int j = 0; j < UNIT_WORDS; ++j) mine_of[j] = from[j][c];
            a[i] = codes_as_bytes(mine_of, octet);
          }
        }
        multiply(sums[t], a[0].x, a[1].x, a[0].y, a[1].y, b);
      }
    }
  };

  for (int block = blockIdx.x, i = 0; block < BLOCKS_OF_OUTS; block += gridDim.x, ++i) {
    const int next = block + gridDim.x;
    const bool more = next < BLOCKS_OF_OUTS;
    float2* levels_here = shared_levels + (GROUPED ? warp : i % 2) * OUTS;
    if constexpr (!GROUPED) {
      start();
      if (more) read_mine(next);
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int j = 0; j < 4; ++j) totals[t][j] = 0;
#pragma unroll 1
    for (int turn = 0; turn < MY_TURNS; turn += SPAN) {
      if constexpr (GROUPED)
        if (turn % PART_TURNS == 0) {
          if (turn > 0) add_up(levels_here);
          __syncwarp();
          const int group = min(turn / PART_TURNS * K_WARPS + warp, FINEST - 1);
#pragma unroll 1
          for (int out = lane; out < OUTS; out += 32)
            levels_here[out] = read_levels(decoder, group, block * OUTS + out);
          __syncwarp();
          start();
        }
      const bool last = turn + SPAN == MY_TURNS;
      from = last ? start_of(next) : from + ((turn + SPAN) % PART_TURNS == 0 ? NEXT_PART : SPAN * NEXT_TURN);
#pragma unroll
      for (int s = 0; s < SPAN; ++s) {
        use(my_digits + (turn + s) * TURN_CODES, codes[s]);
        if (!last || more) read(s, last ? 0 : turn + SPAN, last ? next : block);
      }
    }
    add_up(levels_here);
    float* sums_here = shared_sums + i % 2 * SUMS;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float sum = quad % 2 == 0 ? 16384.f * totals[t][2 * j] + 128.f * totals[t][2 * j + 1] : totals[t][2 * j];
        sum += __shfl_xor_sync(~0u, sum, 1);
        if (quad % 2 == 0 && quad / 2 < ROWS && 2 * t + j < COLUMNS)
          sums_here[(warp * ROWS + my_row) * OUTS + row * COLUMNS + 2 * t + j] =
              sum * (my_row == 0 ? unit_of_x[0] : unit_of_x[ROWS - 1]);
      }
    if constexpr (!GROUPED)
      if (more && threadIdx.x < OUTS) shared_levels[(i + 1) % 2 * OUTS + threadIdx.x] = my_levels;
    __syncthreads();
    write_products(y, sums_here, block * OUTS);
  }
}
