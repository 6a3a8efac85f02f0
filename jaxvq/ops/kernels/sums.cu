// Sums of rows that share a code, the same bits in whatever order they are added: as 64-bit whole numbers.
//
// With few entries all threads would wait for the same few numbers, so there are copies of the table to add up later.
//
// Compiled with: WIDTH (values per row), ENTRIES, COPIES (of the table).

// values: [rows, WIDTH]; codes: [rows]; scales: [WIDTH], what a value is multiplied by before it is rounded; sizes:
// rows; table: [COPIES, ENTRIES, WIDTH], in the memory of zeros.
extern "C" __global__ void sums(const float* __restrict__ values, const int* __restrict__ codes,
                                const float* __restrict__ scales, const int* __restrict__ sizes,
                                const unsigned long long* zeros, unsigned long long* table) {
  table += (long long)(blockIdx.x % COPIES) * ENTRIES * WIDTH;
  const long long total = (long long)sizes[0] * WIDTH, threads = (long long)gridDim.x * blockDim.x;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < total; i += threads) {
    const int column = i % WIDTH;
    const long long whole = __float2ll_rn(values[i] * scales[column]);
    if (whole) atomicAdd(table + (long long)codes[i / WIDTH] * WIDTH + column, (unsigned long long)whole);
  }
}
