// How packed codes and decoders are read, for the kernels of products. Beside what each names, all are compiled with
// SHARED_NBYTES, DECLARED and HALVED, which is 0 but in matmul.cu.

#define FLOAT32 1
#define BFLOAT16 2
#define FLOAT16 3
#define INT8 4

__device__ constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }
__device__ constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// A unit is the fewest words of an output that end where a code and eight values end.
__device__ constexpr int unit_codes(int codes, int values) {
  return values % 8 == 0 ? codes : unit_codes(2 * codes, 2 * values);
}
constexpr int UNIT_CODES = unit_codes(32 / gcd(BITS, 32), 32 / gcd(BITS, 32) * DIM),
              UNIT_WORDS = UNIT_CODES * BITS / 32;
constexpr int UNIT_VALUES = UNIT_CODES * DIM;
constexpr int WORD_ROWS = (LENGTH * BITS + 31) / 32, UNITS = (WORD_ROWS + UNIT_WORDS - 1) / UNIT_WORDS;
constexpr int FINEST = G_BLOCKS > SCALE_G ? G_BLOCKS : SCALE_G;  // groups of the input side with a decoder of their own
constexpr bool GROUPED = FINEST > 1;
constexpr int GROUP_CODES = LENGTH / FINEST;
constexpr int THREADS = K_WARPS * OUT_WARPS * 32;
constexpr int SHARES = 32 / LANES;  // lanes with the same outputs, which take turns along the input side
constexpr int OUTS = LANES * COLUMNS, BLOCK_OUTS = OUTS * OUT_WARPS - HALVED * OUTS / 2;  // of a warp, of a block
constexpr int BLOCKS_OF_OUTS = (OUTPUTS + BLOCK_OUTS - 1) / BLOCK_OUTS;

// Shared memory of SHARED_NBYTES, DECLARED if so much may be: for kernels that are given some at launch XLA has the
// chip make nearly all of its cache shared memory, and x no longer stays in the cache.
#if DECLARED
#define SHARED_MEMORY __shared__ __align__(16) unsigned char memory[SHARED_NBYTES > 0 ? SHARED_NBYTES : 1]
#else
#define SHARED_MEMORY extern __shared__ __align__(16) unsigned char memory[]
#endif

__device__ __forceinline__ float float_of(unsigned short half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
}

// How the bits of a number are held in memory, what is read there, and the number that bits are.
template <int TYPE>
struct BitsOf {
  using type = unsigned short;
};
template <>
struct BitsOf<FLOAT32> {
  using type = unsigned;
};
template <>
struct BitsOf<INT8> {
  using type = unsigned char;
};
template <int TYPE>
__device__ __forceinline__ unsigned bits_at(const void* from, long long index) {
  return __ldg(static_cast<const typename BitsOf<TYPE>::type*>(from) + index);
}
template <int TYPE>
__device__ __forceinline__ float number_of(unsigned bits) {
  if constexpr (TYPE == FLOAT32) return __uint_as_float(bits);
  if constexpr (TYPE == BFLOAT16) return __uint_as_float(bits << 16);
  if constexpr (TYPE == FLOAT16) return float_of((unsigned short)bits);
  return (signed char)bits;
}

__device__ __forceinline__ float x_value(unsigned short bits) { return number_of<BFLOAT ? BFLOAT16 : FLOAT16>(bits); }

__device__ __forceinline__ unsigned short rounded(float x) {
  unsigned short bits;
  if constexpr (BFLOAT) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

template <bool AS_BFLOAT>
__device__ __forceinline__ unsigned two_halves(float low, float high) {
  unsigned both;
  if constexpr (AS_BFLOAT) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// The two float16 of a register.
__device__ __forceinline__ float2 two_floats(unsigned halves) {
  float2 both;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(both.x), "=f"(both.y)
      : "r"(halves));
  return both;
}

// A power of two that brings sizes up to `most` below 2 ** exponent, and one divided by it.
__device__ __forceinline__ float2 power_for(float most, int exponent) {
  const int moved = min(max(exponent + 253 - (int)(__float_as_uint(most) >> 23), 1), 253);
  return make_float2(__uint_as_float(moved << 23), __uint_as_float((254 - moved) << 23));
}

__device__ __forceinline__ unsigned permuted(unsigned low, unsigned high, unsigned selectors) {
  unsigned bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selectors));
  return bytes;
}

// Eight values of a row of x from `from` on, where input `at` is. Beyond the input side x counts as zero.
template <bool INSIDE>
__device__ __forceinline__ uint4 eight_inputs(const unsigned short* from, int at) {
  uint4 all = make_uint4(0, 0, 0, 0);
  if constexpr (INPUTS % 8 == 0) {
    if (INSIDE || at < INPUTS) all = __ldg(reinterpret_cast<const uint4*>(from));
  } else {
    unsigned* to = reinterpret_cast<unsigned*>(&all);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (at + i < INPUTS) to[i / 2] |= (unsigned)__ldg(from + i) << i % 2 * 16;
  }
  return all;
}
template <bool INSIDE>
__device__ __forceinline__ uint4 eight_inputs(const unsigned short* x, int n, int at) {
  return eight_inputs<INSIDE>(x + (long long)n * INPUTS + at, at);
}

// The largest size of N eights of values in a warp. The bits of a float without its sign compare like the float.
template <int N>
__device__ __forceinline__ float largest(const uint4 (&values)[N]) {
  unsigned most = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const unsigned* two = reinterpret_cast<const unsigned*>(&values[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) most = max(most, max(two[j] & 0x7fff, two[j] >> 16 & 0x7fff));
  }
  return x_value((unsigned short)__reduce_max_sync(~0u, most));
}

// Eight values of x times `power`, as float16.
__device__ __forceinline__ uint4 halves_of(const uint4& values, float power) {
  const unsigned* two = reinterpret_cast<const unsigned*>(&values);
  unsigned half[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    half[j] =
        two_halves<false>(x_value((unsigned short)two[j]) * power, x_value((unsigned short)(two[j] >> 16)) * power);
  return make_uint4(half[0], half[1], half[2], half[3]);
}

__device__ __forceinline__ unsigned address_of(const void* shared) {
  return (unsigned)__cvta_generic_to_shared(shared);
}

// Starts to copy COUNT words, one or four, to shared memory; zeros unless `inside`.
template <int COUNT>
__device__ __forceinline__ void start_copy(unsigned to, const unsigned* from, bool inside = true) {
  if constexpr (COUNT == 4)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0));
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(inside ? 4 : 0));
}

// What a thread has started to copy since the last group is a group; it may wait for all but its last groups.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;"); }
template <int GROUPS>
__device__ __forceinline__ void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// The words of one unit of COLUMNS neighbouring outputs.
constexpr int LANE_WORDS = COLUMNS * STAGES;
constexpr long long NEXT_TURN = (long long)SHARES * UNIT_WORDS * OUTPUTS * STAGES;  // words to a lane's next unit

// Where the unit `unit` of `count` outputs from `out` on begins.
__device__ __forceinline__ const unsigned* unit_at(const unsigned* words, int unit, int out, int count = COLUMNS) {
  const int last = OUTPUTS % COLUMNS == 0 ? OUTPUTS - count : OUTPUTS - 1;
  return words + ((long long)unit * UNIT_WORDS * OUTPUTS + min(out, last)) * STAGES;
}

// Reads the unit at `from`, of COUNT outputs. Beyond the end of the input side it reads what is before. Loads of memory
// that is said never to change would be moved below the next barrier, closer to their use.
template <bool INSIDE, int COUNT = COLUMNS>
__device__ __forceinline__ void read_unit(unsigned (&to)[UNIT_WORDS][LANE_WORDS], const unsigned* from, int unit,
                                          int out) {
  constexpr int WORDS = COUNT * STAGES;
#pragma unroll
  for (int i = 0; i < UNIT_WORDS; ++i) {
    const int beyond = INSIDE ? 0 : max(0, unit * UNIT_WORDS + i - (WORD_ROWS - 1));
    const unsigned* row = from + (long long)(i - beyond) * OUTPUTS * STAGES;
    if constexpr (OUTPUTS % COLUMNS == 0 && WORDS % 4 == 0) {
#pragma unroll
      for (int j = 0; j < WORDS; j += 4)
        asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[i][j]), "=r"(to[i][j + 1]), "=r"(to[i][j + 2]), "=r"(to[i][j + 3])
                     : "l"(row + j));
    } else if constexpr (OUTPUTS % COLUMNS == 0 && WORDS % 2 == 0) {
#pragma unroll
      for (int j = 0; j < WORDS; j += 2)
        asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                     : "=r"(to[i][j]), "=r"(to[i][j + 1])
                     : "l"(row + j));
    } else {
#pragma unroll
      for (int j = 0; j < WORDS; ++j) to[i][j] = __ldg(row + (out + j / STAGES < OUTPUTS ? j : j % STAGES));
    }
  }
}

// `(a & mask) | more`, for which the compiler would take two instructions.
__device__ __forceinline__ unsigned masked_or(unsigned a, unsigned mask, unsigned more) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(mask), "r"(more));
  return result;
}

// The COUNT bits of a unit from bit `at` on, times 2**shift, with others beside them; `word` is the output's and
// stage's in each row.
template <int COUNT>
__device__ __forceinline__ unsigned among_others(const unsigned (&words)[UNIT_WORDS][LANE_WORDS], int word, int at,
                                                 int shift) {
  const int i = at / 32, begin = at % 32;
  const unsigned first = words[i][word];
  if (begin + COUNT > 32) return __funnelshift_r(first, words[i + 1][word], begin) << shift;
  return begin >= shift ? first >> (begin - shift) : first << (shift - begin);
}
// Those bits alone.
template <int COUNT>
__device__ __forceinline__ unsigned field_of(const unsigned (&words)[UNIT_WORDS][LANE_WORDS], int word, int at,
                                             int shift) {
  return among_others<COUNT>(words, word, at, shift) & ((1u << COUNT) - 1) << shift;
}
// Those bits, and the bits of `more` beside them.
template <int COUNT>
__device__ __forceinline__ unsigned field_or(const unsigned (&words)[UNIT_WORDS][LANE_WORDS], int word, int at,
                                             int shift, unsigned more) {
  return masked_or(among_others<COUNT>(words, word, at, shift), ((1u << COUNT) - 1) << shift, more);
}

// The bits of eight codes of one output.
__device__ __forceinline__ unsigned bits_of(const unsigned (&words)[UNIT_WORDS], int at) {
  const int i = at / 32, begin = at % 32;
  return begin == 0                                    ? words[i]
         : begin + 8 * BITS > 32 && i + 1 < UNIT_WORDS ? __funnelshift_r(words[i], words[i + 1], begin)
                                                       : words[i] >> begin;
}

// `t` where `mask` is set, `t` moved up elsewhere.
__device__ __forceinline__ unsigned apart(unsigned t, unsigned mask, int by) { return (t & mask) | (t << by & ~mask); }

// Eight codes of at most 4 bits, one in each nibble, as a byte permutation selects by.
__device__ __forceinline__ unsigned nibbles(const unsigned (&words)[UNIT_WORDS], int octet) {
  unsigned t = bits_of(words, octet * 8 * BITS);
  if constexpr (BITS == 3) t = apart(apart(apart(t, 0x00000fff, 4), 0x003f003f, 2), 0x07070707, 1) & 0x77777777;
  else if constexpr (BITS == 2) t = apart(apart(apart(t, 0x000000ff, 8), 0x000f000f, 4), 0x03030303, 2) & 0x33333333;
  else if constexpr (BITS == 1) t = apart(apart(apart(t, 0x0000000f, 12), 0x00030003, 6), 0x01010101, 3) & 0x11111111;
  return t;
}

// The bits of COUNT neighbouring entries of a table of single values.
template <int COUNT>
struct __align__(sizeof(typename BitsOf<VECTORS>::type) * COUNT < 16 ? sizeof(typename BitsOf<VECTORS>::type) * COUNT
                                                                     : 16) Entries {
  typename BitsOf<VECTORS>::type bits[COUNT];
};

struct Decoder {
  const void *vectors, *scales, *zeros;

  __device__ __forceinline__ long long block(int group, int out, int g_blocks, int out_blocks) const {
    const int g = group / (FINEST / g_blocks), o = min(out, OUTPUTS - 1) / (OUTPUTS / out_blocks);
    return (long long)g * out_blocks + o;
  }
  __device__ __forceinline__ unsigned bits_of_scale(int group, int out, int stage = 0) const {
    if constexpr (SCALES == 0) return 0;
    return bits_at<SCALES>(scales, block(group, out, SCALE_G, SCALE_OUT) * SCALE_STAGES + min(stage, SCALE_STAGES - 1));
  }
  __device__ __forceinline__ float scale_of(unsigned bits) const { return SCALES == 0 ? 1 : number_of<SCALES>(bits); }
  __device__ __forceinline__ float scale(int group, int out, int stage = 0) const {
    return scale_of(bits_of_scale(group, out, stage));
  }
  __device__ __forceinline__ float zero(int group, int out) const {
    if constexpr (ZEROS == 0) return BITS == 1 ? 0.5f : (1 << (BITS - 1)) - 1.f;
    return number_of<ZEROS>(bits_at<ZEROS>(zeros, block(group, out, G_BLOCKS, OUT_BLOCKS)));
  }
  __device__ __forceinline__ unsigned bits_of_entry(int group, int out, int stage, int code, int j) const {
    const long long table = block(group, out, G_BLOCKS, OUT_BLOCKS) * STAGES + stage;
    return bits_at<VECTORS>(vectors, (table * ENTRIES + min(code, ENTRIES - 1)) * DIM + j);
  }
  // The entries of COUNT codes from `code`, a multiple of COUNT, on. All are read at once where each code has one.
  template <int COUNT>
  __device__ __forceinline__ Entries<COUNT> entries(int group, int out, int code) const {
    Entries<COUNT> entries;
    if constexpr (ENTRIES == 1 << BITS && ENTRIES % COUNT == 0) {
      const long long first = block(group, out, G_BLOCKS, OUT_BLOCKS) * ENTRIES + code;
      entries = static_cast<const Entries<COUNT>*>(vectors)[first / COUNT];
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) entries.bits[i] = bits_of_entry(group, out, 0, code + i, 0);
    }
    return entries;
  }
  // Value `j` of the vector of a code, without its scale; of the last code for those beyond.
  __device__ __forceinline__ float entry(int group, int out, int stage, int code, int j) const {
    return number_of<VECTORS>(bits_of_entry(group, out, stage, code, j));
  }
  // Values `j` and `j + 1` of a vector of the one codebook, with the stage's scale.
  __device__ __forceinline__ float2 two_values(int stage, int code, int j) const {
    const float by = scale(0, 0, stage);
    if constexpr (VECTORS == BFLOAT16 || VECTORS == FLOAT16) {
      const long long at = ((long long)stage * ENTRIES + min(code, ENTRIES - 1)) * DIM + j;
      const unsigned two = __ldg(static_cast<const unsigned*>(vectors) + at / 2);
      if constexpr (VECTORS == BFLOAT16)
        return make_float2(__uint_as_float(two << 16) * by, __uint_as_float(two & 0xffff0000) * by);
      const float2 both = two_floats(two);
      return make_float2(both.x * by, both.y * by);
    }
    return make_float2(entry(0, 0, stage, code, j) * by, entry(0, 0, stage, code, j + 1) * by);
  }
};

// Adds up what the warps that share the input side have put into `sums`, rows of ROW, in a fixed order, and writes the
// products of a block of outputs; where each thread has many, four together. `sums` begin at a multiple of 16 bytes.
template <int ROW = BLOCK_OUTS>
__device__ __forceinline__ void write_products(unsigned short* y, const float* sums, int first_out) {
  constexpr bool MANY = ROWS * BLOCK_OUTS > 2 * THREADS;
  constexpr int TOGETHER = MANY && BLOCK_OUTS % 4 == 0 && ROW % 4 == 0 && OUTPUTS % 4 == 0 ? 4 : 1;
#pragma unroll 1
  for (int i = threadIdx.x * TOGETHER; i < ROWS * BLOCK_OUTS; i += THREADS * TOGETHER) {
    const int n = i / BLOCK_OUTS, out = first_out + i % BLOCK_OUTS;
    const float* from = sums + n * ROW + i % BLOCK_OUTS;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < K_WARPS; ++w) {
      if constexpr (TOGETHER == 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + w * ROWS * ROW);
        sum.x += four.x, sum.y += four.y, sum.z += four.z, sum.w += four.w;
      } else {
        (&sum.x)[w % 4] += from[w * ROWS * ROW];
      }
    }
    if constexpr (TOGETHER == 1) sum.x = (sum.x + sum.y) + (sum.z + sum.w);
    if (out >= OUTPUTS) continue;
    unsigned short* to = y + (long long)n * OUTPUTS + out;
    if constexpr (TOGETHER == 4)
      *reinterpret_cast<uint2*>(to) = make_uint2(two_halves<BFLOAT>(sum.x, sum.y), two_halves<BFLOAT>(sum.z, sum.w));
    else *to = rounded(sum.x);
  }
}
