// SPDX-License-Identifier: Apache-2.0
/// Running prose out of manual pages: roff markup in, one paragraph a line out.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <utility>

namespace demo {

/// Reads the source of manual pages line by line and keeps the paragraphs of running text. Dropped are headings, the tags of
/// lists, code, tables, macro definitions, paragraphs left in English, pages in the other markup (mdoc), and the sections on
/// copyright and translators, which are the same on every page.
class roff_text {
 public:
  /// Takes one line, without its newline. Text is complete when the next page, or nothing, follows.
  void line(std::string_view s) {
    if (!s.empty() && (s[0] == '.' || s[0] == '\'')) return request(s);
    if (!hidden_until_.empty() || section_is_dropped_ || page_is_dropped_) return;
    if (std::exchange(tag_follows_, false)) return;
    if (s.empty() || s[0] == ' ') return end_paragraph();
    append(s);
  }
  void end_paragraph() {
    if (paragraph_.size() >= shortest && paragraph_.find(" the ") == std::string::npos) text_ += paragraph_ += '\n';
    paragraph_.clear();
  }
  const std::string& text() const noexcept { return text_; }

 private:
  static constexpr std::size_t shortest = 60;  // bytes of a paragraph that counts as prose

  static std::pair<std::string_view, std::string_view> split(std::string_view s) {
    std::size_t begin = 1;
    while (begin < s.size() && s[begin] == ' ') ++begin;
    std::size_t end = begin;
    while (end < s.size() && s[end] != ' ') ++end;
    return {s.substr(begin, end - begin), s.substr(end < s.size() ? end + 1 : end)};
  }
  template <std::size_t N>
  static bool is_one_of(std::string_view s, const std::array<std::string_view, N>& list) {
    for (const std::string_view item : list)
      if (s == item) return true;
    return false;
  }

  void request(std::string_view s) {
    static constexpr std::array<std::string_view, 10> fonts = {"B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "SB"};
    static constexpr std::array<std::string_view, 8> silent = {"\\\"", "", "PD", "ft", "ad", "nh", "hy", "ne"};
    static constexpr std::array<std::pair<std::string_view, std::string_view>, 5> spans = {
        {{"nf", "fi"}, {"EX", "EE"}, {"TS", "TE"}, {"Vb", "Ve"}, {"de", "."}}};
    const auto [name, arguments] = split(s);
    if (!hidden_until_.empty()) {
      if (name == hidden_until_) hidden_until_ = {};
      return;
    }
    if (is_one_of(name, silent)) return;
    if (is_one_of(name, fonts)) return font(name, arguments);
    end_paragraph();
    tag_follows_ = name == "TP" || name == "TQ";
    for (const auto& [from, to] : spans)
      if (name == from) hidden_until_ = to;
    if (name == "TH") page_is_dropped_ = section_is_dropped_ = false;
    if (name == "Dd") page_is_dropped_ = true;  // mdoc
    if (name == "SH") section_is_dropped_ = is_dropped_section(arguments);
  }
  static bool is_dropped_section(std::string_view title) {
    for (const std::string_view word : {"COPYRIGHT", "TRADUCTION", "ÜBERSETZUNG", "AUTEUR", "AUTOR", "COLOPHON", "KOLOPHON",
                                        "SYNOPSIS", "ÜBERSICHT", "VOIR AUSSI", "SIEHE AUCH", "Note de traduction"})
      if (title.find(word) != title.npos) return true;
    return false;
  }
  /// `.B words` or `.BR bold roman bold …`, whose arguments run together.
  void font(std::string_view name, std::string_view arguments) {
    if (section_is_dropped_ || page_is_dropped_) return;
    if (std::exchange(tag_follows_, false)) return;
    std::string joined;
    bool quoted = false;
    for (const char c : arguments) {
      if (c == '"') quoted = !quoted;
      else if (c != ' ' || quoted || name.size() == 1 || name[0] == 'S') joined += c;
    }
    append(joined);
  }

  void append(std::string_view s) {
    if (!paragraph_.empty()) paragraph_ += ' ';
    for (std::size_t i = 0; i < s.size();) {
      if (s[i] != '\\') paragraph_ += s[i++];
      else i = escape(s, i + 1);
    }
  }
  /// Writes what the escape whose name begins at `i` stands for; returns where the text goes on.
  std::size_t escape(std::string_view s, std::size_t i) {
    if (i >= s.size()) return i;
    const auto argument = [&](std::size_t from) -> std::pair<std::string_view, std::size_t> {  // x, (xx or [x…]
      if (from < s.size() && s[from] == '(') return {s.substr(from + 1, 2), from + 3};
      if (from < s.size() && s[from] == '[') {
        const std::size_t end = s.find(']', from);
        return {s.substr(from + 1, end - from - 1), end == s.npos ? s.size() : end + 1};
      }
      return {s.substr(from < s.size() ? from : s.size(), 1), from + 1};
    };
    switch (s[i]) {
      case '-': paragraph_ += '-'; return i + 1;
      case ' ': case '~': case '0': paragraph_ += ' '; return i + 1;
      case 'e': case '\\': paragraph_ += '\\'; return i + 1;
      case '(': case '[': {
        const auto [name, next] = argument(i);
        paragraph_ += glyph(name);
        return next;
      }
      case '*': {
        const auto [name, next] = argument(i + 1);
        paragraph_ += glyph(name);
        return next;
      }
      case 'f': case 'm': case 'n': return argument(i + 1).second;
      case 's': return argument(i + (i + 1 < s.size() && (s[i + 1] == '+' || s[i + 1] == '-') ? 2 : 1)).second;
      case 'h': case 'v': case 'w': {
        const std::size_t end = s.find('\'', i + 2);
        return end == s.npos ? s.size() : end + 1;
      }
      case '"': return s.size();
      default: return i + 1;  // \& \/ \, \% \: \c \| and the like print nothing
    }
  }
  static std::string_view glyph(std::string_view name) {
    static constexpr std::array<std::pair<std::string_view, std::string_view>, 38> table = {{
        {"'e", "é"}, {"`e", "è"}, {"^e", "ê"}, {"`a", "à"}, {"^a", "â"}, {"^i", "î"}, {"^o", "ô"}, {"`u", "ù"}, {"^u", "û"},
        {",c", "ç"}, {"'E", "É"}, {"`A", "À"}, {":a", "ä"}, {":o", "ö"}, {":u", "ü"}, {":A", "Ä"}, {":O", "Ö"}, {":U", "Ü"},
        {"ss", "ß"}, {"oe", "œ"}, {"Fo", "«"}, {"Fc", "»"}, {"lq", "“"}, {"rq", "”"}, {"Bq", "„"}, {"oq", "‘"}, {"cq", "’"},
        {"aq", "'"}, {"dq", "\""}, {"Aq", "'"}, {"en", "–"}, {"em", "—"}, {"hy", "-"}, {"rs", "\\"}, {"ha", "^"}, {"ti", "~"},
        {"C`", "\""}, {"C'", "\""}}};
    for (const auto& [from, to] : table)
      if (name == from) return to;
    return {};
  }

  std::string text_, paragraph_;
  std::string_view hidden_until_;  ///< name of the request that ends a hidden span
  bool tag_follows_ = false, section_is_dropped_ = false, page_is_dropped_ = false;
};

}  // namespace demo
