// x @ w for a row or two of x and palettes of at most 16 values, by tables of the values of two codes.
//
// Two codes that follow each other along the input side are one index into a table of all pairs of values of their
// output. The tables of a block's outputs lie side by side in shared memory, pair by pair, so that every lane of a warp
// reads from a bank of its own whatever the codes are. A lane has COLUMNS neighbouring outputs, two of them in tables
// half a row apart. If LANES, those with different outputs, are fewer than 32, the others have the same outputs and
// another part of the input side. As many such lanes as there are columns each take these in an order of their own, so
// that one table serves all of them; if there are more, tables have copies.
//
// Values and x are float16 in there, scaled by powers of two: a palette to entries below 1 (those below 2**-25 of the
// largest count as zero), x to less than 2048 by its largest value in a warp's part. At most eight products are added
// up in float16, and those sums in float32. The K_WARPS of a block share the input side and add up at the end, in a
// fixed order.
//
// Codes are copied to shared memory RING steps ahead. On its way to registers as much would need as many registers, and
// room in the cache, of which large tables leave too little. A lane's part of x is read from shared memory step by step
// (SPLIT), or once, into registers; then steps are unrolled.
//
// Compiled with: ROWS of x, INPUTS, OUTPUTS, LENGTH (codes along the input side), BITS, BFLOAT (16-bit type of x);
// ENTRIES, OUT_BLOCKS of the palettes; VECTORS, SCALES (types, 0 for none); SCALE_OUT (blocks of scales); LANES,
// COLUMNS (2 or 4), K_WARPS, SPAN (units of a step), RING, SPLIT, TAKES (parts of the outputs that a block takes in
// turn). All else is as for one palette an output, BLOCKS is 1.

#include "codes.cuh"

constexpr int LEVELS = 1 << BITS, PAIRS = LEVELS * LEVELS;
constexpr int STRIDE = 256, SHIFT = log2_of(STRIDE);  // bytes from a pair to the next
constexpr int TWO_BYTES = PAIRS * STRIDE;             // of two columns, or of as many outputs
// Lanes with the same outputs take their columns in orders of their own. That pays where tables are large.
constexpr bool CROSSED = SHARES > 1 && BITS > 2;
constexpr int COPIES_OF_TABLE = CROSSED ? SHARES / COLUMNS : SHARES, KEPT = CROSSED ? 1 : COLUMNS;
constexpr int TABLE_BYTES = TWO_BYTES * (CROSSED ? 1 : COLUMNS / 2);
__device__ constexpr int column_at(int column) { return CROSSED ? 0 : column / 2 * TWO_BYTES + column % 2 * 128; }
constexpr int STEPS = (UNITS + K_WARPS * SHARES * SPAN - 1) / (K_WARPS * SHARES * SPAN), TURNS = STEPS * SPAN;
constexpr int UNROLLED = SPLIT ? 1 : STEPS, OCTETS = UNIT_CODES / 8;
constexpr bool ALL_STARTED = TAKES == 1 && RING >= STEPS;  // all codes are on their way before the first is used
constexpr int ROW_BYTES = THREADS * COLUMNS * 4, STEP_ROWS = SPAN * UNIT_WORDS, STEP_BYTES = STEP_ROWS * ROW_BYTES;
constexpr int MY_CODES = TURNS * SHARES * UNIT_CODES, X_ROW = K_WARPS * MY_CODES, X_READS = (MY_CODES + 255) / 256;
constexpr bool EXACT = LENGTH == INPUTS && X_ROW == LENGTH;
// Eights of codes whose products are added up in float16: at most eight in each half of a register.
constexpr int CHAIN = SPAN * UNIT_CODES % 16 == 0 ? 2 : 1;
constexpr int GRID = (BLOCKS_OF_OUTS + TAKES - 1) / TAKES;                             // blocks of threads
constexpr int STAGED = LEVELS * OUTS, READ = STAGED > THREADS ? STAGED / THREADS : 1;  // values, those of a thread
constexpr int AT_ONCE = LEVELS < 8 ? LEVELS : 8;  // values of a palette that are read at once
struct __align__(2 * AT_ONCE) Values {
  unsigned two[AT_ONCE / 2];
};
constexpr int COPIED = OUTPUTS % 4 == 0 ? 4 : 1;  // words that are copied at once
constexpr int PARTS = CROSSED ? 1 : COLUMNS;      // of a table, written by warps of their own
constexpr int PART_WARPS = K_WARPS / PARTS, PART_OUTS = OUTS / PARTS;
static_assert(OUT_WARPS == 1 && K_WARPS % PARTS == 0, "all warps of a block share its outputs and tables");
static_assert(CROSSED ? SHARES % COLUMNS == 0 : COLUMNS == 2 || SHARES == 1 && COLUMNS == 4, "rows of tables are full");
static_assert(RING > 0, "codes come by the ring");
static_assert(READ <= AT_ONCE, "a thread's values lie side by side");
static_assert(STAGES == 1 && DIM == 1 && !GROUPED, "a palette for an output");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    pairs(const unsigned short* __restrict__ x, const unsigned* __restrict__ words, const void* vectors,
          const void* __restrict__ scales, const void* __restrict__ zeros, unsigned short* __restrict__ y) {
  SHARED_MEMORY;
  const Decoder decoder{vectors, scales, zeros};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, share = lane / LANES;
  const int crossed = CROSSED ? share / COPIES_OF_TABLE : 0, copy = share % COPIES_OF_TABLE;
  unsigned char* ring = memory + TABLE_BYTES;
  unsigned short* shared_x = reinterpret_cast<unsigned short*>(ring + RING * STEP_BYTES);
  float* sums = reinterpret_cast<float*>(shared_x + ROWS * X_ROW);
  float* powers = sums + K_WARPS * ROWS * OUTS;  // of the palettes, those of this block of outputs and the next
  unsigned short* staged = reinterpret_cast<unsigned short*>(powers + 2 * OUTS);  // the palettes

  // A thread has neighbouring values of a palette, until they are used their bits: a number would have to be there
  // before anything else is asked for.
  const int my_value = threadIdx.x * READ, my_out = my_value / LEVELS, my_code = my_value % LEVELS;
  const bool has_values = STAGED % THREADS == 0 || my_value < STAGED;
  Entries<READ> entries;
  unsigned scale;
  auto read_palettes = [&](int block) {
    const int out = block * OUTS + my_out;
    if (!has_values) return;
    entries = decoder.entries<READ>(0, out, my_code);
    scale = decoder.bits_of_scale(0, out);
  };
  // Values go from the registers by shared memory into tables of pairs.
  auto stage_palettes = [&](float* powers) {
    if (!has_values) return;
    float values[READ], most = 0;
#pragma unroll
    for (int i = 0; i < READ; ++i) {
      values[i] = number_of<VECTORS>(entries.bits[i]) * decoder.scale_of(scale);
      most = fmaxf(most, isfinite(values[i]) ? fabsf(values[i]) : 0);
    }
#pragma unroll
    for (int far = 1; far < LEVELS / READ; far *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, far));
    const float2 power = power_for(most, 0);
    const int row = my_out % PARTS * PART_OUTS + my_out / PARTS;
    unsigned short* to = staged + (my_code / AT_ONCE * OUTS + row) * AT_ONCE + my_code % AT_ONCE;
#pragma unroll
    for (int i = 0; i < READ; ++i) to[i] = (unsigned short)two_halves<false>(values[i] * power.x, 0);
    if (my_code == 0) powers[my_out] = power.y;
  };
  auto write_tables = [&] {
    const int part = warp % PARTS;
    const unsigned short* mine = staged + (part * PART_OUTS + lane % PART_OUTS) * AT_ONCE;
    Values first[LEVELS / AT_ONCE];
#pragma unroll
    for (int i = 0; i < LEVELS / AT_ONCE; ++i) first[i] = reinterpret_cast<const Values*>(mine)[i * OUTS];
    unsigned char* table = memory + column_at(part) + lane * 4;
#pragma unroll
    for (int i = 0; i < (LEVELS + PART_WARPS - 1) / PART_WARPS; ++i) {
      const int code = warp / PARTS + i * PART_WARPS;
      if (LEVELS % PART_WARPS == 0 || code < LEVELS) {
        const unsigned second = mine[code / AT_ONCE * OUTS * AT_ONCE + code % AT_ONCE];
#pragma unroll
        for (int other = 0; other < LEVELS; ++other)
          *reinterpret_cast<unsigned*>(table + (code * LEVELS + other) * STRIDE) =
              permuted(first[other / AT_ONCE].two[other % AT_ONCE / 2], second, other % 2 ? 0x5432 : 0x5410);
      }
    }
  };

  const int first_unit = warp * TURNS * SHARES;
  unsigned char* my_ring = ring + warp * 32 * COLUMNS * 4;
  int coming_block = blockIdx.x, coming_turn = 0;
  // Starts to copy this warp's words of the step after the last one. Beyond the input side they are some before.
  auto start = [&](int place) {
    if (coming_block < BLOCKS_OF_OUTS) {
      constexpr int COPIES_OF_ROW = 32 * COLUMNS / COPIED, COUNT = STEP_ROWS * COPIES_OF_ROW;
      const unsigned to = address_of(my_ring + place * STEP_BYTES);
#pragma unroll
      for (int i = 0; i < (COUNT + 31) / 32; ++i) {
        const int copy = i * 32 + lane, row = copy / COPIES_OF_ROW, word = copy % COPIES_OF_ROW * COPIED;
        if (COUNT % 32 != 0 && copy >= COUNT) continue;
        const int unit = first_unit + (coming_turn + row / UNIT_WORDS) * SHARES + word / OUTS;
        const int from_row = unit * UNIT_WORDS + row % UNIT_WORDS;
        const int out = min(coming_block * OUTS + word % OUTS, OUTPUTS - COPIED);
        start_copy<COPIED>(to + row * ROW_BYTES + word * 4,
                           words + (long long)(EXACT ? from_row : min(from_row, WORD_ROWS - 1)) * OUTPUTS + out);
      }
      coming_turn += SPAN;
      if (coming_turn == TURNS) coming_turn = 0, coming_block += GRID;
    }
    end_group();
  };
  unsigned codes[SPAN][UNIT_WORDS][COLUMNS];
  // The words of the step that was started first. Then there is room for another.
  auto take = [&](int place) {
    wait_for_all_but<RING - 1>();
    __syncwarp();
#pragma unroll
    for (int s = 0; s < SPAN; ++s)
#pragma unroll
      for (int i = 0; i < UNIT_WORDS; ++i) {
        const unsigned char* from =
            my_ring + place * STEP_BYTES + (s * UNIT_WORDS + i) * ROW_BYTES + lane * COLUMNS * 4;
        if constexpr (CROSSED) {
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j)
            codes[s][i][j] = *reinterpret_cast<const unsigned*>(from + (j ^ crossed) * 4);
        } else {
#pragma unroll
          for (int j = 0; j < COLUMNS; j += 2) {
            const uint2 two = *reinterpret_cast<const uint2*>(from + j * 4);
            codes[s][i][j] = two.x, codes[s][i][j + 1] = two.y;
          }
        }
      }
    __syncwarp();
  };
  read_palettes(blockIdx.x);
  // All palettes are asked for before codes are: memory would let those of some blocks wait behind the codes of others.
  __syncthreads();
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
  for (int place = 0; place < RING; ++place) start(place);

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
  uint4 held[ROWS][SPLIT ? 1 : TURNS * OCTETS];
  if constexpr (!SPLIT) {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < ROWS; ++n)
#pragma unroll
      for (int i = 0; i < TURNS * OCTETS; ++i) held[n][i] = x_of(n, i / OCTETS, i % OCTETS);
  }
  stage_palettes(powers);
  __syncthreads();

  // Where this lane reads a row of the table, in bytes.
  unsigned place_of[COLUMNS];
#pragma unroll
  for (int column = 0; column < COLUMNS; ++column)
    place_of[column] = CROSSED ? (copy * OUTS + lane % LANES * COLUMNS + (column ^ crossed)) * 4 : lane * 4;
  float totals[ROWS][COLUMNS][2];
  unsigned chains[ROWS][COLUMNS];
  auto use = [&](int turn, int first_octet, const unsigned (&from)[UNIT_WORDS][COLUMNS]) {
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
          if constexpr (BITS == 4)  // two codes are a byte: it becomes the second of the offset, the place the first
            offset = permuted(from[at / 32][column], place_of[column], 0x7704 | at % 32 / 8 << 4);
          else offset = field_or<2 * BITS>(from, column, at, SHIFT, place_of[column]);
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
  for (int i = 0, block = blockIdx.x; i < TAKES && block < BLOCKS_OF_OUTS; ++i, block += GRID) {
    const int next = block + GRID;
    const bool more = i + 1 < TAKES && next < BLOCKS_OF_OUTS;
    write_tables();
    __syncthreads();
    if (more) read_palettes(next);
#pragma unroll
    for (int n = 0; n < ROWS; ++n)
#pragma unroll
      for (int column = 0; column < COLUMNS; ++column) totals[n][column][0] = totals[n][column][1] = 0;
#pragma unroll UNROLLED
    for (int step = 0; step < STEPS; ++step) {
      take(place);
      if constexpr (ALL_STARTED) end_group();  // with nothing in it, since groups are counted
      else start(place);
#pragma unroll
      for (int s = 0; s < SPAN; ++s) use(step * SPAN + s, s * OCTETS, codes[s]);
      place = place + 1 < RING ? place + 1 : 0;
    }
#pragma unroll
    for (int n = 0; n < ROWS; ++n) {
#pragma unroll
      for (int column = 0; column < COLUMNS; ++column) totals[n][column][0] += totals[n][column][1];
      // Lanes with columns in orders of their own halve what they have until each has its first.
      if constexpr (CROSSED) {
#pragma unroll
        for (int half = COLUMNS / 2; half > 0; half /= 2)
#pragma unroll
          for (int column = 0; column < half; ++column)
            totals[n][column][0] += __shfl_xor_sync(~0u, totals[n][column + half][0], half * COPIES_OF_TABLE * LANES);
      }
#pragma unroll
      for (int column = 0; column < KEPT; ++column) {
#pragma unroll
        for (int far = LANES; far < COPIES_OF_TABLE * LANES; far *= 2)
          totals[n][column][0] += __shfl_xor_sync(~0u, totals[n][column][0], far);
        const int out = lane % LANES * COLUMNS + (column ^ crossed);
        if (copy == 0)
          sums[(warp * ROWS + n) * OUTS + out] = totals[n][column][0] * (x_power[n] * powers[i % 2 * OUTS + out]);
      }
    }
    if (more) stage_palettes(powers + (i + 1) % 2 * OUTS);
    __syncthreads();
    write_products(y, sums, block * OUTS);
  }
}
