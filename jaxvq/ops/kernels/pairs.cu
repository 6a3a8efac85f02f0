// x @ w for a row or two of x and palettes of at most 16 values, by tables of the values of two codes.
//
// Two codes that follow each other along the input side are one index into a table of all pairs of values of their
// output. The tables of a block's outputs lie side by side in shared memory, pair by pair, so that every lane of a warp
// reads from a bank of its own whatever the codes are. A lane has COLUMNS neighbouring outputs, two of them in tables
// half a row apart. If LANES, those with different outputs, are fewer than 32, the others have the same outputs, tables
// of their own and another part of the input side.
//
// Values and x are float16 in there, scaled by powers of two: a palette to entries below 1 (those below 2**-25 of the
// largest count as zero), x to less than 2048 by its largest value in a warp's part. At most eight products are added
// up in float16, and those sums in float32. The K_WARPS of a block share the input side and add up at the end, in a
// fixed order.
//
// Codes are read some steps ahead, one step into registers, or RING steps into shared memory: large tables leave too
// little of it as cache for all that should be on its way to registers. A lane's part of x is read from shared memory
// step by step (SPLIT), or once, into registers; then steps are unrolled.
//
// Compiled with: ROWS of x, INPUTS, OUTPUTS, LENGTH (codes along the input side), BITS, BFLOAT (16-bit type of x);
// ENTRIES, OUT_BLOCKS of the palettes; VECTORS, SCALES (types, 0 for none); SCALE_OUT (blocks of scales); LANES,
// COLUMNS (2 or 4), K_WARPS, SPAN (units of a step), RING, SPLIT, BLOCKS (at once on a processor). All else is as for
// one palette an output.

#include "codes.cuh"

constexpr int LEVELS = 1 << BITS, PAIRS = LEVELS * LEVELS;
constexpr int STRIDE = 256, SHIFT = log2_of(STRIDE);                                // bytes from a pair to the next
constexpr int TWO_BYTES = PAIRS * STRIDE, TABLE_BYTES = TWO_BYTES * (COLUMNS / 2);  // of two columns, of all
__device__ constexpr int column_at(int column) { return column / 2 * TWO_BYTES + column % 2 * 128; }
constexpr int STEPS = (UNITS + K_WARPS * SHARES * SPAN - 1) / (K_WARPS * SHARES * SPAN), TURNS = STEPS * SPAN;
constexpr int UNROLLED = SPLIT ? 1 : STEPS, OCTETS = UNIT_CODES / 8;
constexpr int ROW_BYTES = THREADS * COLUMNS * 4, STEP_ROWS = SPAN * UNIT_WORDS, STEP_BYTES = STEP_ROWS * ROW_BYTES;
constexpr int MY_CODES = TURNS * SHARES * UNIT_CODES, X_ROW = K_WARPS * MY_CODES, X_READS = (MY_CODES + 255) / 256;
constexpr bool EXACT = LENGTH == INPUTS && X_ROW == LENGTH;
// Eights of codes whose products are added up in float16: at most eight in each half of a register.
constexpr int CHAIN = SPAN * UNIT_CODES % 16 == 0 ? 2 : 1;
constexpr int STAGED = LEVELS * OUTS, RAW = (STAGED + THREADS - 1) / THREADS;
constexpr int COLUMN_WARPS = K_WARPS / COLUMNS;  // that write the table of a column
static_assert(OUT_WARPS == 1 && K_WARPS % COLUMNS == 0, "all warps of a block share its outputs and tables");
static_assert(COLUMNS % 2 == 0, "two columns to a row of a table");
static_assert(STAGES == 1 && DIM == 1 && !GROUPED, "a palette for an output");
static_assert(RING == 0 || (OUTPUTS % 4 == 0 && LANES == 32), "words are copied by fours, a row by lanes in order");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    pairs(const unsigned short* __restrict__ x, const unsigned* __restrict__ words, const void* __restrict__ vectors,
          const void* __restrict__ scales, const void* __restrict__ zeros, unsigned short* __restrict__ y) {
  SHARED_MEMORY;
  const Decoder decoder{vectors, scales, zeros};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, share = lane / LANES;
  unsigned char* ring = memory + TABLE_BYTES;
  unsigned short* shared_x = reinterpret_cast<unsigned short*>(ring + RING * STEP_BYTES);
  float* sums = reinterpret_cast<float*>(shared_x + ROWS * X_ROW);
  float* powers = sums + K_WARPS * ROWS * OUTS;  // of the palettes, those of this block of outputs and the next
  unsigned short* staged = reinterpret_cast<unsigned short*>(powers + 2 * OUTS);  // the palettes

  float raw[RAW];
  auto read_palettes = [&](int block) {
#pragma unroll
    for (int i = 0; i < RAW; ++i) {
      const int item = threadIdx.x + i * THREADS, out = block * OUTS + item / LEVELS, code = item % LEVELS;
      if (STAGED % THREADS == 0 || item < STAGED) raw[i] = decoder.scale(0, out) * decoder.entry(0, out, 0, code, 0);
    }
  };
  // Values go from the registers by shared memory into tables of pairs.
  auto stage_palettes = [&](float* powers) {
#pragma unroll
    for (int i = 0; i < RAW; ++i) {
      const int item = threadIdx.x + i * THREADS, out = item / LEVELS, code = item % LEVELS;
      if (STAGED % THREADS == 0 || item < STAGED) {
        float most = isfinite(raw[i]) ? fabsf(raw[i]) : 0;
#pragma unroll
        for (int far = 1; far < LEVELS; far *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, far));
        const float2 power = power_for(most, 0);
        staged[code * OUTS + out % COLUMNS * LANES + out / COLUMNS] =
            (unsigned short)two_halves<false>(raw[i] * power.x, 0);
        if (code == 0) powers[out] = power.y;
      }
    }
  };
  auto write_tables = [&] {
    const int column = warp % COLUMNS;
    const unsigned short* mine = staged + column * LANES + lane % LANES;
    unsigned first[LEVELS];
#pragma unroll
    for (int code = 0; code < LEVELS; ++code) first[code] = mine[code * OUTS];
    unsigned char* table = memory + column_at(column) + lane * 4;
#pragma unroll
    for (int i = 0; i < (LEVELS + COLUMN_WARPS - 1) / COLUMN_WARPS; ++i) {
      const int code = warp / COLUMNS + i * COLUMN_WARPS;
      if (LEVELS % COLUMN_WARPS == 0 || code < LEVELS) {
        const unsigned second = (unsigned)mine[code * OUTS] << 16;
#pragma unroll
        for (int other = 0; other < LEVELS; ++other)
          *reinterpret_cast<unsigned*>(table + (code * LEVELS + other) * STRIDE) = first[other] | second;
      }
    }
  };

  const int first_unit = warp * TURNS * SHARES, my_out = lane % LANES * COLUMNS;
  unsigned char* my_ring = ring + warp * 32 * COLUMNS * 4;
  // A lane copies four words, of two columns also its neighbour's, some of them for each row of a step.
  constexpr int COPYING = 8 * COLUMNS, ROWS_AT_ONCE = 32 / COPYING;
  const int copied_row = lane / COPYING, copied_out = lane % COPYING * 4;
  unsigned coming[SPAN][UNIT_WORDS][LANE_WORDS];
  int coming_block = blockIdx.x, coming_turn = 0;
  // Starts to read this warp's words of the step after the last one. Beyond the input side they are some before.
  auto start = [&](int place) {
    if (coming_block < BLOCKS_OF_OUTS) {
      const int unit = first_unit + coming_turn * SHARES;
      if constexpr (RING == 0) {
        const int out = coming_block * OUTS + my_out;
        const unsigned* from = unit_at(words, unit + share, out);
#pragma unroll
        for (int s = 0; s < SPAN; ++s)
          read_unit<EXACT>(coming[s], from + s * NEXT_TURN, unit + s * SHARES + share, out);
      } else {
        const int out = min(coming_block * OUTS + copied_out, OUTPUTS - 4);
        const unsigned to = address_of(my_ring + place * STEP_BYTES + copied_row * ROW_BYTES + copied_out * 4);
#pragma unroll
        for (int i = 0; i < STEP_ROWS; i += ROWS_AT_ONCE) {
          if (STEP_ROWS % ROWS_AT_ONCE != 0 && i + copied_row >= STEP_ROWS) continue;
          const int row = unit * UNIT_WORDS + i + copied_row;
          start_copy<4>(to + i * ROW_BYTES, words + (long long)(EXACT ? row : min(row, WORD_ROWS - 1)) * OUTPUTS + out);
        }
      }
      coming_turn += SPAN;
      if (coming_turn == TURNS) coming_turn = 0, coming_block += gridDim.x;
    }
    if constexpr (RING > 0) end_group();
    else __syncwarp();  // else the compiler has this wait until what was started before has been used
  };
  unsigned codes[SPAN][UNIT_WORDS][LANE_WORDS];
  // The words of the step that was started first. Then there is room for another.
  auto take = [&](int place) {
    if constexpr (RING > 0) {
      wait_for_all_but<RING - 1>();
      __syncwarp();
    }
#pragma unroll
    for (int s = 0; s < SPAN; ++s)
#pragma unroll
      for (int i = 0; i < UNIT_WORDS; ++i) {
        const unsigned char* from =
            my_ring + place * STEP_BYTES + (s * UNIT_WORDS + i) * ROW_BYTES + lane * COLUMNS * 4;
#pragma unroll
        for (int j = 0; j < COLUMNS; j += 2) {
          uint2 two;
          if constexpr (RING == 0) two = make_uint2(coming[s][i][j], coming[s][i][j + 1]);
          else two = *reinterpret_cast<const uint2*>(from + j * 4);
          codes[s][i][j] = two.x, codes[s][i][j + 1] = two.y;
        }
      }
    if constexpr (RING > 0) __syncwarp();
  };
  read_palettes(blockIdx.x);
  // The part of x that this warp multiplies.
  uint4 my_x[ROWS][X_READS];
#pragma unroll
  for (int n = 0; n < ROWS; ++n)
#pragma unroll
    for (int i = 0; i < X_READS; ++i) {
      const int mine = i * 256 + lane * 8, at = warp * MY_CODES + mine;
      my_x[n][i] = mine < MY_CODES ? eight_inputs<EXACT>(x, n, at) : make_uint4(0, 0, 0, 0);
    }
  // Not unrolled, for else the compiler has the codes read first, and tables wait for palettes behind them.
#pragma unroll 1
  for (int place = 0; place < max(RING, 1); ++place) start(place);
  if constexpr (RING == 0) take(0);

  float x_power[ROWS];
#pragma unroll
  for (int n = 0; n < ROWS; ++n) {
    const float2 power = power_for(largest(my_x[n]), 11);
    x_power[n] = power.y;
#pragma unroll
    for (int i = 0; i < X_READS; ++i) {
      const uint4 halves = halves_of(my_x[n][i], power.x);
      if (i * 256 + lane * 8 < MY_CODES)
        *reinterpret_cast<uint4*>(shared_x + n * X_ROW + warp * MY_CODES + i * 256 + lane * 8) = halves;
    }
  }

  const unsigned short* first_x = shared_x + (first_unit + share) * UNIT_CODES;
  auto x_of = [&](int n, int turn, int octet) {
    return *reinterpret_cast<const uint4*>(first_x + n * X_ROW + turn * SHARES * UNIT_CODES + octet * 8);
  };
  stage_palettes(powers);
  uint4 held[ROWS][SPLIT ? 1 : TURNS * OCTETS];
  if constexpr (!SPLIT) {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < ROWS; ++n)
#pragma unroll
      for (int i = 0; i < TURNS * OCTETS; ++i) held[n][i] = x_of(n, i / OCTETS, i % OCTETS);
  }
  __syncthreads();

  float totals[ROWS][COLUMNS][2];
  unsigned chains[ROWS][COLUMNS];
  auto use = [&](int turn, int first_octet, const unsigned (&from)[UNIT_WORDS][LANE_WORDS]) {
#pragma unroll
    for (int octet = 0; octet < OCTETS; ++octet) {
      unsigned inputs[ROWS][4];
#pragma unroll
      for (int n = 0; n < ROWS; ++n) {
        const uint4 all = SPLIT ? x_of(n, turn, octet) : held[n][SPLIT ? 0 : turn * OCTETS + octet];
        inputs[n][0] = all.x, inputs[n][1] = all.y, inputs[n][2] = all.z, inputs[n][3] = all.w;
      }
#pragma unroll
      for (int column = 0; column < COLUMNS; ++column) {
#pragma unroll
        for (int two = 0; two < 4; ++two) {
          const int at = (octet * 8 + 2 * two) * BITS;
          unsigned offset;
          if constexpr (BITS == 4)  // two codes are a byte: it becomes the second of the offset, lane * 4 the first
            offset = permuted(from[at / 32][column], lane * 4, 0x7704 | at % 32 / 8 << 4);
          else offset = field_or<2 * BITS>(from, column, at, SHIFT, lane * 4);
          const unsigned values = *reinterpret_cast<const unsigned*>(memory + column_at(column) + offset);
#pragma unroll
          for (int n = 0; n < ROWS; ++n) {
            if (two == 0 && (first_octet + octet) % CHAIN == 0)
              asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(chains[n][column]) : "r"(values), "r"(inputs[n][0]));
            else asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(chains[n][column]) : "r"(values), "r"(inputs[n][two]));
          }
        }
#pragma unroll
        for (int n = 0; n < ROWS; ++n) {
          if ((first_octet + octet) % CHAIN != CHAIN - 1) continue;
          const float2 both = two_floats(chains[n][column]);
          totals[n][column][0] += both.x, totals[n][column][1] += both.y;
        }
      }
    }
  };

  int place = 0;  // of the ring
#pragma unroll 1
  for (int block = blockIdx.x, i = 0; block < BLOCKS_OF_OUTS; block += gridDim.x, ++i) {
    const int next = block + gridDim.x;
    const bool more = next < BLOCKS_OF_OUTS;
    write_tables();
    __syncthreads();
    if (more) read_palettes(next);
#pragma unroll
    for (int n = 0; n < ROWS; ++n)
#pragma unroll
      for (int column = 0; column < COLUMNS; ++column) totals[n][column][0] = totals[n][column][1] = 0;
#pragma unroll UNROLLED
    for (int step = 0; step < STEPS; ++step) {
      if constexpr (RING > 0) take(place);
      start(place);
#pragma unroll
      for (int s = 0; s < SPAN; ++s) use(step * SPAN + s, s * OCTETS, codes[s]);
      if constexpr (RING == 0) take(0);
      place = place + 1 < RING ? place + 1 : 0;
    }
#pragma unroll
    for (int n = 0; n < ROWS; ++n)
#pragma unroll
      for (int column = 0; column < COLUMNS; ++column) {
        const int out = my_out + column;
        float sum = totals[n][column][0] + totals[n][column][1];
#pragma unroll
        for (int far = LANES; far < 32; far *= 2) sum += __shfl_xor_sync(~0u, sum, far);
        if (share == 0) sums[(warp * ROWS + n) * OUTS + out] = sum * (x_power[n] * powers[i % 2 * OUTS + out]);
      }
    if (more) stage_palettes(powers + (i + 1) % 2 * OUTS);
    __syncthreads();
    write_products(y, sums, block * OUTS);
  }
}
