// Causal attention over blocked keys and values.
//
// Keys are taken in tiles of 512 at absolute positions. Each tile gives a row its own maximum, sum and weighted values
// from scratch; tiles are merged in their order. So a row's bits do not depend on the chunk it came in, on the thread that
// computed a tile, or on the other rows. (Merging of partial softmaxes: Milakov and Gimelshein, arXiv 1805.02867.)
//
// A creditor may hold the leading tiles of a request (loans.h). It merges them in their order, and this process goes on from
// its result: the same merges in the same order, so the same bits.
#pragma once

#include <algorithm>
#include <vector>

#include "loans.h"

namespace splitfuse {
namespace SF_VARIANT {

static_assert(TILE == 2 * SLAB_STEPS, "the weights of a tile fill one slab");
constexpr int TILE_PIECES = TILE / PIECE;
constexpr int SCORE_STRIDE = TILE + LANES;
constexpr i64 SOFTMAX_BYTES = 1024;             // that the softmax prefetches at once
constexpr float NOTHING = -1e30f;               // The maximum of no scores.

// Rows of an item. With the small tiles of AVX2 an item has two tiles, so that keys and values come from memory once for both.
constexpr int ITEM_ROWS = BLOCK_ROWS < 12 ? 2 * BLOCK_ROWS : BLOCK_ROWS;
#ifdef SF_TILES
constexpr int MOST_ITEM_ROWS = 2 * ITEM_ROWS;
constexpr int ROWS_READ = MOST_ITEM_ROWS + TILE_ROWS;  // tiles read whole, whatever follows the rows of x
constexpr int ROWS_OF_TWO = TILE_ROWS;                 // most rows that are multiplied with two panels at once
#else
constexpr int MOST_ITEM_ROWS = 4 * ITEM_ROWS;
constexpr int ROWS_READ = MOST_ITEM_ROWS;
constexpr int ROWS_OF_TWO = FEW_ROWS;
#endif

// More rows share the work of turning keys into values.
SF_INLINE int item_rows(const Layout& kv) { return kv.value_from ? MOST_ITEM_ROWS : ITEM_ROWS; }

constexpr int ROWS_PADDED = (MOST_ITEM_ROWS + LANES - 1) / LANES * LANES;

// Rows `first` to first + rows - 1 of one request and kv head, flattened (token, head of the group); tiles begin to end.
struct Item {
    i32 request, head, rows;
    i64 first;
    i64 begin_tile, end_tile;
    i64 partial;    // Where the tiles' results go, to be merged later; -1: they are merged at once.
    i32 loan;       // Place of the request's loan, -1: it has none.
    i64 own_tiles;  // The first tile that no creditor holds.
    i64 num_partials;  // Of this item and its other parts together.
};

// The result of one tile, or of several merged, for the rows of an item.
struct Partial {
    float maximum[ROWS_PADDED], total[ROWS_PADDED];
    float* values;  // [rows, padded]
};

struct Attention {
    const Step& step;
    const Heads& heads;
    const Store& store;
    const u16* q;               // [T, H, D]
    u16* out;                   // [T, H, D], or [T, H, value_dim]
    u8* widened;                // int8 without WIDENS_INT8: this thread's buffer for one tile
    i64 layer = 0;
    float* lent = nullptr;      // for a debtor: where merged tiles go rather than to out, [T, H] of lent_floats()
    Channel* channel = nullptr; // to the debtor
    i64 out_stride = 0;         // from token to token in out; 0: they lie side by side

    // Position of the item's request's first row.
    i64 start(const Item& item) const {
        return step.seq_lens[item.request] - (step.query_start[item.request + 1] - step.query_start[item.request]);
    }
    // The first position that the query at `position` sees.
    i64 first_seen(i64 position) const {
        i64 first = heads.window ? std::max<i64>(0, position - heads.window + 1) : 0;
        return heads.chunk ? std::max(first, position / heads.chunk * heads.chunk) : first;
    }
    // The first of the item's tiles that any row sees.
    i64 first_tile(const Item& item) const {
        i64 position = start(item) + item.first / (heads.num_heads / store.num_kv_heads);
        return std::max<i64>(item.begin_tile, first_seen(position) / TILE);
    }
};

// Number of floats of one tile's result that is kept for merging: maxima, totals, values.
SF_INLINE i64 partial_floats(const Layout& kv) { return item_rows(kv) * (2 + kv.value_padded); }

// Most bytes of own tiles that a request with a loan computes before its creditor answers. With more it waits first.
constexpr i64 DEFERRED_BYTES = 1 << 24;

// Makes the items of all requests, longest first; if there are few, long ones in parts. Returns how many tiles get partials.
// Only the first `most_tiles` of a request are computed.
inline i64 make_items(const Step& step, i64 num_heads, const Layout& kv, int num_threads, i64 most_tiles, std::vector<Item>& items) {
    items.clear();
    const i64 group = num_heads / kv.num_kv_heads;
    for (i32 request = 0; request < step.requests; ++request) {
        i64 tokens = step.query_start[request + 1] - step.query_start[request];
        i64 rows = tokens * group, blocks = ceil_div(rows, item_rows(kv));
        const i32 loan = step.loans ? step.loans->of_request[request] : -1;
        const i64 own_tiles = loan < 0 ? 0 : step.loans->of[loan].tiles;
        for (i32 head = 0; head < kv.num_kv_heads; ++head)
            for (i64 block = 0; block < blocks; ++block) {
                i64 first = rows * block / blocks, end = rows * (block + 1) / blocks;
                i64 last_position = step.seq_lens[request] - tokens + (end - 1) / group;
                i64 end_tile = std::min(last_position / TILE + 1, most_tiles);
                items.push_back({request, head, static_cast<i32>(end - first), first, own_tiles, end_tile, -1, loan, own_tiles, 0});
            }
    }
    i64 partials = 0;
    const bool few = static_cast<int>(items.size()) < 2 * num_threads && num_threads > 1;
    if (few || step.loans) {
        i64 tiles = 0;
        for (const Item& item : items) tiles += item.end_tile - item.begin_tile;
        const i64 most = few ? std::max<i64>(1, tiles / (3 * num_threads)) : tiles;
        std::vector<Item> parts;
        for (Item item : items) {
            const i64 count = item.end_tile - item.begin_tile;
            const i64 tokens = step.query_start[item.request + 1] - step.query_start[item.request];
            const bool deferred = item.loan >= 0 && tokens * num_heads * count * (2 + kv.value_padded) * 4 <= DEFERRED_BYTES;
            if (count <= most && !deferred) {
                parts.push_back(item);
                continue;
            }
            item.partial = partials;
            item.num_partials = count;
            partials += count;
            const i64 end_tile = item.end_tile;
            for (i64 begin = item.own_tiles; begin < end_tile; begin += most) {
                item.begin_tile = begin;
                item.end_tile = std::min(begin + most, end_tile);
                parts.push_back(item);
            }
        }
        items.swap(parts);
    }
    auto waits = [](const Item& item) { return item.loan >= 0 && item.partial < 0; };
    std::stable_sort(items.begin(), items.end(), [&](const Item& a, const Item& b) {
        if (waits(a) != waits(b)) return waits(b);
        return a.end_tile - a.begin_tile > b.end_tile - b.begin_tile;
    });
    return partials;
}

SF_INLINE void widen_qvalues(const u8* qvalues, i64 count, u16* out) {  // exact: 8 bits hold a qvalue
    for (i64 i = 0; i < count; i += 2 * LANES) widen_i8(reinterpret_cast<const i8*>(qvalues + i), out + i);
}

// Where the pieces of one tile of an item lie. Those from `first` to `end` - 1 have keys that some row sees.
struct Pieces {
    i64 first, end, keys;  // keys: of the tile, up to the last that any row sees
    const u8* of[TILE_PIECES];
};

SF_INLINE Pieces pieces_of(const Attention& a, const Layout& kv, const Item& item, i64 tile) {
    Pieces pieces;
    const i64 group = a.heads.num_heads / kv.num_kv_heads, first_key = tile * TILE;
    const i64 start = a.start(item);
    const i64 last_position = start + (item.first + item.rows - 1) / group;
    const i64 first_seen = std::max<i64>(0, a.first_seen(start + item.first / group) - first_key);
    pieces.keys = std::min<i64>(last_position + 1 - first_key, TILE);
    pieces.first = first_seen / PIECE;
    pieces.end = ceil_div(pieces.keys, PIECE);
    // Block by block: a division for each piece would take as long as two of its steps.
    const i64 place = first_key / PIECE + pieces.first;
    const i32* block = a.step.tables + static_cast<i64>(item.request) * a.step.table_width + place / kv.pieces;
    i64 of_block = place % kv.pieces;
    for (i64 p = pieces.first; p < pieces.end; ++p) {
        pieces.of[p] = kv.piece(*block, item.head, of_block * PIECE);
        if (++of_block < kv.pieces) continue;
        of_block = 0;
        ++block;
    }
    return pieces;
}

// What a thread prefetches: the keys and values of the tiles that it will compute, in the order in which it reads them, at a
// distance that stays about the same. While a tile is computed, as many bytes are prefetched as it has itself, so memory is asked for
// lines at the pace at which they are used, be this tile or the next one long or short.
class Ahead {
  public:
    struct Range { const u8* from; i64 bytes; };

    Ahead(const Attention& a, const Layout& kv, const std::vector<Item>& items)
        : a_(a), kv_(kv), items_(items), key_bytes_(kv.int8 ? kv.piece_bytes : ceil_div(kv.head_dim, 2) * STEP_BYTES),
          distance_(TILE_PIECES * (kv.int8 ? kv.piece_bytes : kv.half_bytes)) {}

    // Goes on with a run of items, `next` being the first of the next run, or -1.
    void begin_run(i64 begin, i64 end, i64 next) {
        begin_ = begin;
        end_ = end;
        next_ = next;
        if (is_over_ && item_ == begin) enter(following(begin));
    }
    // Begins a tile of an item: sets how many bytes are prefetched while it is computed.
    void begin_tile(i64 item, i64 tile, const Pieces& pieces) {
        const i64 bytes = bytes_of(pieces), read = is_near(item) ? 0 : bytes;
        if (read && ready_ <= 0) {  // nothing has prefetched this tile
            item_ = item;
            tile_ = tile;
            ready_ = 0;
            enter_pieces(pieces);
            for (i64 left = distance_; left > 0 && !is_over_;) {
                const Range range = take(left);
                prefetch_lines(range.from, range.bytes);
                left -= range.bytes;
            }
        }
        taken_ = 0;
        budget_ = is_over_ ? 0 : std::min(std::max<i64>(read + distance_ - ready_, 0), 2 * bytes);
        ready_ -= read;
    }
    i64 budget() const { return budget_; }
    // Returns the next bytes, at most `most`, if no more than `until` of the budget are taken with about half of them; else none.
    Range until(i64 until, i64 most) {
        if (taken_ + most / 2 > until || is_over_) return {nullptr, 0};
        return take(most);
    }

  private:
#ifdef SF_AVX512
    static constexpr i64 NEAR_BYTES_OF_HEAD = 1 << 19;  // keys and values that stay in the second cache from item to item: half of its size
#else
    static constexpr i64 NEAR_BYTES_OF_HEAD = 1 << 18;  // the same, of second caches of 512 KB
#endif

    i64 bytes_of(const Pieces& pieces) const {
        const i64 count = pieces.end - pieces.first;
        if (kv_.int8 || kv_.value_from) return count * key_bytes_;
        return count * key_bytes_ + (ceil_div(pieces.keys, 2) - pieces.first * (PIECE / 2)) * kv_.padded * 4;
    }
    // Returns whether the item before this one, by the same thread, has just read the same keys and values.
    bool is_near(i64 item) const {
        if (item <= begin_ || item >= end_) return false;
        const Item &one = items_[item], &before = items_[item - 1];
        return one.request == before.request && one.head == before.head && one.begin_tile == before.begin_tile &&
               one.end_tile == before.end_tile && (one.end_tile - one.begin_tile) * TILE_PIECES * kv_.piece_bytes <= NEAR_BYTES_OF_HEAD;
    }
    Range take(i64 most) {
        const Range range{from_, std::min(most, left_)};
        ready_ += range.bytes;
        taken_ += range.bytes;
        from_ += range.bytes;
        if ((left_ -= range.bytes) == 0) go_on();
        return range;
    }
    void go_on() {
        if (++piece_ < pieces_.end) return enter_piece();
        piece_ = pieces_.first;
        of_values_ = !of_values_ && !kv_.int8 && !kv_.value_from;
        if (of_values_) enter_piece();
        else if (++tile_ < items_[item_].end_tile) enter_pieces(pieces_of(a_, kv_, items_[item_], tile_));
        else enter(following(item_));
    }
    // Returns the item behind one, as far as this thread has claimed them; else -1.
    i64 following(i64 item) const {
        if (item < begin_ || item >= end_) return -1;  // it is the first of the next run, which may lie before this one
        return item + 1 < end_ ? item + 1 : next_;
    }
    void enter(i64 item) {
        for (is_over_ = true; item >= 0; item = following(item)) {
            item_ = item;
            tile_ = a_.first_tile(items_[item]);
            if (tile_ < items_[item].end_tile && !is_near(item)) return enter_pieces(pieces_of(a_, kv_, items_[item], tile_));
        }
    }
    void enter_pieces(const Pieces& pieces) {
        pieces_ = pieces;
        piece_ = pieces.first;
        of_values_ = false;
        is_over_ = pieces.first >= pieces.end;
        if (!is_over_) enter_piece();
    }
    void enter_piece() {
        from_ = pieces_.of[piece_] + (of_values_ ? kv_.half_bytes : 0);
        left_ = of_values_ ? std::min<i64>(ceil_div(pieces_.keys - piece_ * PIECE, 2), PIECE / 2) * kv_.padded * 4 : key_bytes_;
    }

    const Attention& a_;
    const Layout& kv_;
    const std::vector<Item>& items_;
    const i64 key_bytes_, distance_;
    i64 begin_ = 0, end_ = 0, next_ = -1;  // the run
    i64 item_ = -1, tile_ = 0, piece_ = 0; // what is prefetched next
    Pieces pieces_{0, 0, 0, {}};
    bool of_values_ = false, is_over_ = true;
    const u8* from_ = nullptr;
    i64 left_ = 0;                // bytes of the piece's keys or values
    i64 ready_ = 0;               // bytes that are prefetched and not yet used
    i64 budget_ = 0, taken_ = 0;  // of the current tile
};

// The keys of a tile that a row sees, begin to end - 1, and the vectors of scores that they lie in, first to last - 1.
struct Seen {
    i64 begin, end, first, last;

    Seen(i64 begin, i64 end) : begin(begin), end(end), first(begin / LANES * LANES), last(end <= begin ? first : ceil_div(end, LANES) * LANES) {}
    Floats only(i64 k, Floats value, Floats other) const {
        return between(static_cast<int>(std::max<i64>(begin - k, 0)), static_cast<int>(std::min<i64>(end - k, LANES)), value, other);
    }
};

// Returns scores or weights of the keys from `k` on, times the keys' scales if SCALED (an int8 cache).
template <bool SCALED>
SF_INLINE Floats scaled(Floats value, const float* scales, i64 k) {
    if constexpr (SCALED) return value * load(scales + k);
    return value;
}

// Returns the maximum of the scores of one row of a tile, in powers of two, to which `scale` takes a score.
template <bool SCALED>
SF_INLINE float most_of(const float* scores, const float* scales, const Seen& seen, float scale) {
    if (seen.first >= seen.last) return NOTHING;
    auto of = [&](i64 k) { return scaled<SCALED>(load(scores + k), scales, k); };
    const i64 last = seen.last - LANES;
    Floats most = seen.only(seen.first, of(seen.first), broadcast(NOTHING)), other = seen.only(last, of(last), broadcast(NOTHING));
    for (i64 k = seen.first + LANES; k < last; k += 2 * LANES) {  // the last one twice, perhaps
        most = max(most, of(k));
        other = max(other, of(std::min(k + LANES, last - LANES)));
    }
    return highest(max(most, other)) * scale;
}

// Turns scores into weights, zero for keys that are not seen, up to `keys`. Returns their total; the weights are then scaled if SCALED.
// Not inlined: among all else GCC would keep the sums and factors in memory, and chunks take 1.11 of the time (AMD Zen 4).
template <bool SCALED>
SF_LEAF float soften(const float* scores, const float* key_scales, const float* value_scales, const Seen& seen, i64 keys, float scale,
                       float maximum, Element* weights) {
    const Floats factor = broadcast(scale), minus = broadcast(-maximum), zero = broadcast(0.0f);
    Floats sums = zero;
    auto weight_of = [&](i64 k) { return exp2_weight(fma(scaled<SCALED>(load(scores + k), key_scales, k), factor, minus)); };
    auto put_part = [&](i64 k) {
        const Floats weight = seen.only(k, weight_of(k), zero);
        sums += weight;
        store_elements(weights + k, seen.only(k, scaled<SCALED>(weight, value_scales, k), zero));
    };
    i64 k = 0;
    for (; k < seen.first; k += LANES) store_elements(weights + k, zero);
    if (k < seen.last) {
        put_part(k);
        for (k += LANES; k < seen.last - LANES; k += LANES) {
            const Floats weight = weight_of(k);
            sums += weight;
            store_elements(weights + k, scaled<SCALED>(weight, value_scales, k));
        }
        if (k < seen.last) put_part(k);
    }
    for (k = seen.last; k < keys; k += LANES) store_elements(weights + k, zero);
    return sum(sums);
}

SF_INLINE void cap(float* scores, i64 begin, i64 end, float scale, float softcap) {  // afterwards in powers of two
    for (i64 k = begin; k < end; k += LANES)
        store(scores + k, tanh(load(scores + k) * broadcast(scale / softcap)) * broadcast(softcap * LOG2E));
}

// Lowers scores by their distance from key `last`, the query's own, as ALiBi does. Afterwards they are in powers of two.
SF_INLINE void lower(float* scores, i64 begin, i64 end, float scale, float slope, i64 last) {
    alignas(64) static constexpr float NUMBERS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (i64 k = begin; k < end; k += LANES) {
        Floats distance = broadcast(static_cast<float>(k - last)) + load(NUMBERS);  // 0 or less, where a row sees
        store(scores + k, fma(distance, broadcast(slope), load(scores + k) * broadcast(scale)));
    }
}

SF_INLINE void multiply_by(float* values, const float* by, i64 begin, i64 end) {
    for (i64 k = begin; k < end; k += LANES) store(values + k, load(values + k) * load(by + k));
}

// A row of an item as a token of its request and a head; ++ goes on to the next without dividing.
struct Row {
    i64 group, end_head, token, head;

    Row(const Item& item, i64 group, i64 row = 0)
        : group(group), end_head((item.head + 1) * group), token((item.first + row) / group),
          head(item.head * group + (item.first + row) % group) {}
    void operator++() {
        if (++head < end_head) return;
        head -= group;
        ++token;
    }
};

// Rows `first` to first + rows - 1 of an item, which are multiplied at once.
struct RowTile { int first, rows; };

SF_INLINE int num_row_tiles(const Item& item) { return (item.rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }
SF_INLINE RowTile row_tile(const Item& item, int number) {
    const int count = num_row_tiles(item), first = item.rows * number / count;
    return {first, item.rows * (number + 1) / count - first};
}

// Slabs that a query takes.
SF_INLINE i64 num_slabs(const Layout& kv) { return ceil_div(kv.head_dim, 2 * SLAB_STEPS); }

// Copies the queries of an item, as the micro-kernels read them: of each tile of rows slab after slab.
SF_INLINE void copy_queries(const Attention& a, const Layout& kv, const Item& item, u32* queries) {
    const i64 group = a.heads.num_heads / kv.num_kv_heads, slabs = num_slabs(kv), slab_dim = 2 * SLAB_STEPS;
    for (int t = 0; t < num_row_tiles(item); ++t) {
        const RowTile tile = row_tile(item, t);
        Row row(item, group, tile.first);
        for (int r = 0; r < tile.rows; ++r, ++row) {
            const i64 token = a.step.query_start[item.request] + row.token;
            const u16* q = a.q + (token * a.heads.num_heads + row.head) * kv.head_dim;
            for (i64 slab = 0; slab < slabs; ++slab) {
                Element* place = reinterpret_cast<Element*>(queries + (tile.first * slabs + slab * tile.rows + r) * SLAB_STRIDE);
                const i64 count = std::min(kv.head_dim - slab * slab_dim, slab_dim);
                copy_elements(place, q + slab * slab_dim, count);
                if (count % 2) place[count] = 0;
            }
        }
    }
}

// Writes the values of 32 tokens from their keys: 32 elements from `column` on.
SF_INLINE void turn_piece(const Layout& kv, const u8* keys, i64 column, i64 tokens, u8* values) {
    turn_pairs(keys + (kv.value_from + column) / 2 * STEP_BYTES, values);
    if (tokens < PIECE && tokens % 2) {  // the last has a neighbour that may be NaN
        u16* halves = reinterpret_cast<u16*>(values + tokens / 2 * STEP_BYTES);
        for (int d = 0; d < PANEL; ++d) halves[2 * d + 1] = 0;
    }
}

// Computes one tile for the rows of an item, while it prefetches what comes next. `queries` are its slabs of q.
SF_INLINE void attend_tile(const Attention& a, const Layout& kv, const Item& item, i64 tile, const Pieces& pieces, Ahead& ahead,
                           const u32* queries, Partial& out) {
    alignas(64) float scores[MOST_ITEM_ROWS * SCORE_STRIDE];
    alignas(64) u32 weights[ROWS_READ * SLAB_STRIDE];
    alignas(64) u8 turned[TILE_PIECES][PIECE / 2 * STEP_BYTES];
    alignas(64) float key_scales[TILE], value_scales[TILE];
    const u8 *keys_of[TILE_PIECES], *values_of[TILE_PIECES], *prefetches[TILE_PIECES];
    const i64 group = a.heads.num_heads / kv.num_kv_heads, first_key = tile * TILE, start = a.start(item);
    const i64 first = pieces.first, end = pieces.end, half_wide = PIECE * kv.padded * 2;

    for (i64 p = first; p < end; ++p) {
        keys_of[p] = pieces.of[p];
        values_of[p] = kv.value_from ? pieces.of[p] : pieces.of[p] + kv.half_bytes;
        if (kv.int8) {
            std::memcpy(key_scales + p * PIECE, kv.scales(pieces.of[p]), PIECE * sizeof(float));
            std::memcpy(value_scales + p * PIECE, kv.scales(pieces.of[p]) + PIECE, PIECE * sizeof(float));
            if (WIDENS_INT8) continue;
            u8* wide = a.widened + p * 2 * half_wide;
            widen_qvalues(pieces.of[p], 2 * PIECE * kv.padded, reinterpret_cast<u16*>(wide));
            keys_of[p] = wide;
            values_of[p] = wide + half_wide;
        }
    }
    const bool int8 = WIDENS_INT8 && kv.int8;
    const i64 steps = ceil_div(kv.head_dim, 2), slabs = num_slabs(kv), word_bytes = int8 ? 2 : 4;
    // Tiles of rows, each of which prefetches its part.
    const int row_tiles = num_row_tiles(item);
    const i64 prefetch_stride = STEP_BYTES / row_tiles;
    auto segments = [&](const u8* const* starts, const u8* const* prefetched, i64 segment_steps, i64 total, i64 stride) {
        return Segments{starts, prefetched, static_cast<int>(segment_steps), total, stride, prefetch_stride, false, int8};
    };
    // Products prefetch nearly all of what comes next, the softmax a tenth. One that is to prefetch nothing gets lines of its own.
    const i64 of_keys = ahead.budget() * 45 / 100, before_values = ahead.budget() * 55 / 100;
    const i64 per_key = (of_keys << 16) / (row_tiles * (end - first));
    i64 slot = 0;
    auto prefetch_beside = [&](i64 until, i64 most, const u8* else_from) {
        const Ahead::Range range = ahead.until(until, most);
        return range.bytes ? range.from : else_from;
    };
    for (int t = 0; t < row_tiles; ++t) {
        const auto [row, rows] = row_tile(item, t);
        for (i64 p = first; p < end; ++p)
            prefetches[p] = prefetch_beside(per_key * ++slot >> 16, steps * prefetch_stride, keys_of[p]);
        float* row_scores = scores + row * SCORE_STRIDE;
        const u32* q = queries + row * slabs * SLAB_STRIDE;
        i64 alone = first;  // the first piece that is multiplied by itself
        if (slabs == 1) {
            const bool odd = rows <= FEW_ROWS && (end - first) % 2;  // of pieces that are multiplied two at once
            alone = end - odd;
            const Segments keys = segments(keys_of + first, prefetches + first, steps, steps * (alone - first), PANEL * word_bytes);
            if (alone > first) multiply_each(rows, q, keys, row_scores + first * PIECE, SCORE_STRIDE);
        }
        for (i64 p = alone; p < end; ++p) {
            const Segments keys = segments(keys_of + p, prefetches + p, steps, steps, PANEL * word_bytes);
            multiply_kv(rows, q, keys, row_scores + p * PIECE, SCORE_STRIDE);
        }
    }

    const bool in_powers = a.heads.softcap > 0.0f || a.heads.slopes;  // of two, once they are capped or lowered
    const float scale = in_powers ? 1.0f : a.heads.scale * LOG2E;
    auto seen_by = [&](const Row& row) {
        const i64 position = start + row.token;
        const i64 seen_end = std::min(std::max<i64>(position + 1 - first_key, 0), pieces.keys);
        return Seen(std::min(std::max<i64>(a.first_seen(position) - first_key, 0), seen_end), seen_end);
    };
    // All maxima first: each waits for the last of its lanes, and meanwhile the next row's are compared.
    Row row_of(item, group);
    for (i32 r = 0; r < item.rows; ++r, ++row_of) {
        float* row = scores + r * SCORE_STRIDE;
        const Seen seen = seen_by(row_of);
        if (in_powers && kv.int8) multiply_by(row, key_scales, first * PIECE, end * PIECE);
        if (a.heads.softcap > 0.0f) cap(row, first * PIECE, end * PIECE, a.heads.scale, a.heads.softcap);
        if (a.heads.slopes) {
            const float capped_scale = a.heads.softcap > 0.0f ? 1.0f : a.heads.scale * LOG2E;
            const float slope = a.heads.slopes[row_of.head] * LOG2E;
            lower(row, first * PIECE, end * PIECE, capped_scale, slope, start + row_of.token - first_key);
        }
        if (kv.int8 && !in_powers) out.maximum[r] = most_of<true>(row, key_scales, seen, scale);
        else out.maximum[r] = most_of<false>(row, key_scales, seen, scale);
    }
    if (in_powers && kv.int8) std::fill(key_scales + first * PIECE, key_scales + end * PIECE, 1.0f);  // scores are scaled already
    row_of = Row(item, group);
    for (i32 r = 0; r < item.rows; ++r, ++row_of) {
        for (Ahead::Range range; (range = ahead.until(before_values * (r + 1) / item.rows, SOFTMAX_BYTES)).bytes;)
            prefetch_lines(range.from, range.bytes);
        Element* row_weights = reinterpret_cast<Element*>(weights + r * SLAB_STRIDE);
        const float* row = scores + r * SCORE_STRIDE;
        const Seen seen = seen_by(row_of);
        if (kv.int8) out.total[r] = soften<true>(row, key_scales, value_scales, seen, end * PIECE, scale, out.maximum[r], row_weights);
        else out.total[r] = soften<false>(row, key_scales, value_scales, seen, end * PIECE, scale, out.maximum[r], row_weights);
    }

    // Only pairs with a key that exists: what follows may be NaN.
    const i64 pairs = ceil_div(pieces.keys, 2) - first * (PIECE / 2);
    const i64 whole = pieces.keys / PIECE, value_slots = std::max<i64>(kv.value_padded / PANEL * row_tiles * (whole - first), 1);
    const i64 per_value = ((ahead.budget() - before_values) << 16) / value_slots;
    slot = 0;
    for (i64 column = 0; column < kv.value_padded;) {
        const bool two = item.rows <= ROWS_OF_TWO && column + PANEL < kv.value_padded && !kv.value_from;
        const u8* starts[TILE_PIECES];
        for (i64 p = first; p < end; ++p) {
            if (kv.value_from) turn_piece(kv, values_of[p], column, pieces.keys - p * PIECE, turned[p]);
            starts[p - first] = kv.value_from ? turned[p] : values_of[p] + column * word_bytes;
        }
        for (int t = 0; t < row_tiles; ++t) {
            const auto [row, rows] = row_tile(item, t);
            for (i64 p = first; p < end; ++p) {
                prefetches[p - first] = starts[p - first];
                if (p >= whole) continue;
                const int panels = two ? 2 : 1;
                slot += panels;
                prefetches[p - first] = prefetch_beside(before_values + (per_value * slot >> 16), panels * PIECE / 2 * prefetch_stride, starts[p - first]);
            }
            const Segments values = segments(starts, prefetches, PIECE / 2, pairs, kv.value_from ? STEP_BYTES : kv.padded * word_bytes);
            const u32* x = weights + first * (PIECE / 2) * PAIR_WORDS + row * SLAB_STRIDE;
            float* sums = out.values + row * kv.value_padded + column;
            if (two) multiply_two(rows, x, values, sums, kv.value_padded);
            else multiply_kv(rows, x, values, sums, kv.value_padded);
        }
        column += two ? 2 * PANEL : PANEL;
    }
}

SF_INLINE void merge(const Partial& tile, i64 padded, i32 rows, Partial& all) {
    alignas(64) float keep[ROWS_PADDED], add[ROWS_PADDED];
    for (i32 r = 0; r < rows; r += LANES) {  // of all lanes, those beyond the rows too
        const Floats before = load(all.maximum + r), other = load(tile.maximum + r), maximum = max(before, other);
        const Floats kept = exp2_weight(before - maximum), added = exp2_weight(other - maximum);
        store(keep + r, kept);
        store(add + r, added);
        store(all.maximum + r, maximum);
        store(all.total + r, load(all.total + r) * kept + load(tile.total + r) * added);
    }
    for (i32 r = 0; r < rows; ++r) {
        const Floats kept = broadcast(keep[r]), added = broadcast(add[r]);
        for (i64 d = 0; d < padded; d += LANES) {
            float* value = all.values + r * padded + d;
            store(value, fma(load(value), kept, load(tile.values + r * padded + d) * added));
        }
    }
}

SF_INLINE void begin_rows(const Attention& a, const Item& item, i64 group, i64 padded, Partial& all) {
    Row row(item, group);
    for (i32 r = 0; r < item.rows; ++r, ++row) {
        all.maximum[r] = a.heads.sinks ? a.heads.sinks[row.head] * LOG2E : NOTHING;
        all.total[r] = a.heads.sinks ? 1.0f : 0.0f;
        std::memset(all.values + r * padded, 0, padded * sizeof(float));
    }
}

// Begins with what the creditor of the item's request gives, if there is one that has tiles which the request sees.
SF_INLINE void begin_with_loan(const Attention& a, const Layout& kv, const Item& item, i64 group, Partial& all) {
    Loan* loan = item.loan < 0 ? nullptr : a.step.loans->of + item.loan;
    if (!loan || !loan->awaits || !wait_for_answer(*loan)) return begin_rows(a, item, group, kv.value_padded, all);
    const i64 tokens = a.step.query_start[item.request + 1] - a.step.query_start[item.request];
    const float* given = answers(*loan->channel, tokens * a.heads.num_heads * kv.head_dim);
    Row row(item, group);
    for (i32 r = 0; r < item.rows; ++r, ++row) {
        const float* from = given + (row.token * a.heads.num_heads + row.head) * lent_floats(kv);
        all.maximum[r] = from[0];
        all.total[r] = from[1];
        std::memcpy(all.values + r * kv.value_padded, from + 2, kv.value_padded * sizeof(float));
    }
}

// Writes the merged tiles of an item as begin_with_loan() reads them.
SF_INLINE void lend_rows(const Attention& a, const Layout& kv, const Item& item, i64 group, const Partial& all) {
    Row row(item, group);
    for (i32 r = 0; r < item.rows; ++r, ++row) {
        float* to = a.lent + (row.token * a.heads.num_heads + row.head) * lent_floats(kv);
        to[0] = all.maximum[r];
        to[1] = all.total[r];
        std::memcpy(to + 2, all.values + r * kv.value_padded, kv.value_padded * sizeof(float));
    }
}

SF_INLINE void end_rows(const Attention& a, const Layout& kv, const Item& item, i64 group, const Partial& all) {
    if (a.lent) return lend_rows(a, kv, item, group, all);
    const i64 stride = a.out_stride ? a.out_stride : a.heads.num_heads * kv.value_dim;
    Row row(item, group);
    for (i32 r = 0; r < item.rows; ++r, ++row) {
        const i64 token = a.step.query_start[item.request] + row.token;
        u16* out = a.out + token * stride + row.head * kv.value_dim;
        const Floats share = broadcast(1.0f / all.total[r]);
        for (i64 d = 0; d < kv.value_dim; d += LANES) {
            Floats value = load(all.values + r * kv.value_padded + d) * share;
            if (kv.value_dim - d < LANES) store_bf16(out + d, value, static_cast<int>(kv.value_dim - d));
            else store_bf16(out + d, value);
        }
    }
}

// Writes the result of a tile that no row sees.
SF_INLINE void forget(const Layout& kv, float* place) {
    const int rows = item_rows(kv);
    for (int r = 0; r < rows; ++r) place[r] = NOTHING;
    std::memset(place + rows, 0, (partial_floats(kv) - rows) * sizeof(float));
}

// Sends the queries of the requests with loans to the creditors that have tiles which these see.
inline void ask_creditors(Team& team, const Attention& a, const Layout& kv) {
    if (!a.step.loans) return;
    team.split(a.step.loans->count, [&](i64 begin, i64 end) {
        for (i64 i = begin; i < end; ++i) {
            Loan& loan = a.step.loans->of[i];
            const i64 first = a.step.query_start[loan.request], tokens = a.step.query_start[loan.request + 1] - first;
            const i64 position = a.step.seq_lens[loan.request] - tokens, token_queries = a.heads.num_heads * kv.head_dim;
            loan.awaits = tokens && a.first_seen(position) < loan.tiles * i64{TILE};
            if (!loan.awaits) continue;
            const i64 needed = answer_offset(tokens * token_queries) + tokens * a.heads.num_heads * lent_floats(kv) * 4;
            ask(loan, {ATTEND, static_cast<i32>(a.layer), static_cast<i32>(tokens), loan.tiles, position}, needed, [&](u8* data) {
                std::memcpy(data, a.q + first * token_queries, tokens * token_queries * 2);
            });
        }
    });
}

// Computes all items; `partials` has room for the number of tiles that make_items() returned. Returns when all are done.
inline void attend(Team& team, const Attention& a, const std::vector<Item>& items, float* partials) {
    const Layout kv(a.store);
    const i64 group = a.heads.num_heads / kv.num_kv_heads, stride = partial_floats(kv);
    const int most_rows = item_rows(kv);
    bool split = false;
    for (const Item& item : items) split |= item.partial >= 0;
    ask_creditors(team, a, kv);

    Ahead ahead(a, kv, items);
    team.share(static_cast<i64>(items.size()), [&](i64 begin, i64 end, i64 next_run) {
        alignas(64) u32 queries[ROWS_READ * (MOST_HEAD_DIM / 2 / SLAB_STEPS) * SLAB_STRIDE];
        alignas(64) float tile_values[MOST_ITEM_ROWS * MOST_HEAD_DIM], all_values[MOST_ITEM_ROWS * MOST_HEAD_DIM];
        Partial tile{{}, {}, tile_values}, all{{}, {}, all_values};
        ahead.begin_run(begin, end, next_run);
        for (i64 i = begin; i < end; ++i) {
            const Item& item = items[i];
            copy_queries(a, kv, item, queries);
            const i64 first_tile = std::min(a.first_tile(item), item.end_tile);
            // Without sinks the first tile merged with nothing is itself.
            const bool alone = item.partial < 0 && !a.heads.sinks && item.loan < 0 && first_tile < item.end_tile;
            if (item.partial < 0 && !alone) begin_with_loan(a, kv, item, group, all);
            const auto place_of = [&](i64 t) { return partials + (item.partial + t - item.own_tiles) * stride; };  // of a tile's result
            for (i64 t = item.begin_tile; t < first_tile && item.partial >= 0; ++t) forget(kv, place_of(t));
            for (i64 t = first_tile; t < item.end_tile; ++t) {
                const Pieces pieces = pieces_of(a, kv, item, t);
                ahead.begin_tile(i, t, pieces);
                if (alone && t == first_tile) {
                    attend_tile(a, kv, item, t, pieces, ahead, queries, all);
                } else if (item.partial < 0) {
                    attend_tile(a, kv, item, t, pieces, ahead, queries, tile);
                    merge(tile, kv.value_padded, item.rows, all);
                } else {
                    float* place = place_of(t);
                    Partial part{{}, {}, place + 2 * most_rows};
                    attend_tile(a, kv, item, t, pieces, ahead, queries, part);
                    std::copy_n(part.maximum, most_rows, place);
                    std::copy_n(part.total, most_rows, place + most_rows);
                }
            }
            if (item.partial < 0) end_rows(a, kv, item, group, all);
            if (a.channel) beat(*a.channel);
        }
    });
    if (!split) return;
    team.share(static_cast<i64>(items.size()), [&](i64 begin, i64 end, i64) {
        alignas(64) float all_values[MOST_ITEM_ROWS * MOST_HEAD_DIM];
        Partial all{{}, {}, all_values};
        for (i64 i = begin; i < end; ++i) {
            const Item& item = items[i];
            if (item.partial < 0 || item.begin_tile > item.own_tiles) continue;  // the first part of each stands for the whole
            begin_with_loan(a, kv, item, group, all);
            for (i64 t = 0; t < item.num_partials; ++t) {
                float* place = partials + (item.partial + t) * stride;
                Partial part{{}, {}, place + 2 * most_rows};
                std::copy_n(place, most_rows, part.maximum);
                std::copy_n(place + most_rows, most_rows, part.total);
                merge(part, kv.value_padded, item.rows, all);
            }
            end_rows(a, kv, item, group, all);
        }
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
