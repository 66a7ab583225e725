//! Builds SVG pictures of rectangles and text. They refer to no external font, file or script.

use std::fmt::Write as _;

/// The style of every picture. It has its own background, so the page may be light or dark.
const STYLE: &str = "text{fill:#d6d9de;font-size:13px}\
.mono{font-family:Menlo,Consolas,\"DejaVu Sans Mono\",monospace}\
.sans{font-family:\"Segoe UI\",\"DejaVu Sans\",sans-serif}\
.bold{font-weight:bold}.dim{fill:#8d96a0}\
.red{fill:#ff7b72}.green{fill:#7ee787}.yellow{fill:#e3b341}\
.blue{fill:#79c0ff}.magenta{fill:#d2a8ff}.cyan{fill:#56d4dd}";

pub(super) const BACKGROUND: &str = "#161b22";
pub(super) const EDGE: &str = "#57606a";

/// A picture that is being built. All lengths are in pixels.
pub(super) struct Svg {
    width: u32,
    height: u32,
    title: String,
    body: String,
}

/// A position and a size.
#[derive(Clone, Copy)]
pub(super) struct Area {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
}

impl Svg {
    /// An empty picture with a background. Screen readers read the title.
    pub(super) fn new(width: u32, height: u32, title: &str) -> Self {
        let mut svg = Self {
            width,
            height,
            title: escape(title),
            body: String::new(),
        };
        let all = Area {
            x: 0,
            y: 0,
            width: width - 1,
            height: height - 1,
        };
        svg.rectangle(all, BACKGROUND);
        svg
    }

    pub(super) fn rectangle(&mut self, area: Area, fill: &str) {
        let Area {
            x,
            y,
            width,
            height,
        } = area;
        // The offset of half a pixel makes edges of one pixel sharp.
        self.push(&format!(
            "<rect x=\"{x}.5\" y=\"{y}.5\" width=\"{width}\" height=\"{height}\" rx=\"4\" \
             fill=\"{fill}\" stroke=\"{EDGE}\"/>"
        ));
    }

    /// Adds text with the baseline at `y`. With a width the text is stretched to it, so that columns stay
    /// aligned in any font.
    pub(super) fn text(&mut self, x: u32, y: u32, width: Option<u32>, class: &str, text: &str) {
        let length = width.map_or_else(String::new, |width| {
            format!(" textLength=\"{width}\" lengthAdjust=\"spacingAndGlyphs\"")
        });
        let text = escape(text);
        self.push(&format!(
            "<text x=\"{x}\" y=\"{y}\"{length} class=\"{class}\">{text}</text>"
        ));
    }

    fn push(&mut self, element: &str) {
        self.body.push_str(element);
        self.body.push('\n');
    }

    pub(super) fn finish(self) -> String {
        let Self {
            width,
            height,
            title,
            body,
        } = self;
        let mut svg = String::new();
        // Writing to a String cannot fail.
        let _ = write!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\" role=\"img\">\n\
             <title>{title}</title>\n<style>{STYLE}</style>\n{body}</svg>\n"
        );
        svg
    }
}

/// Escapes text for XML. Control characters are omitted, because XML cannot contain them.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() => {}
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_of_xml_markup_are_escaped() {
        assert_eq!(
            escape("a<b> & \"c\"\u{7}"),
            "a&lt;b&gt; &amp; &quot;c&quot;"
        );
        let mut svg = Svg::new(10, 10, "R&D");
        svg.text(1, 2, Some(16), "red", "<>");
        let text = svg.finish();
        assert!(text.contains("<title>R&amp;D</title>"), "{text}");
        let line = "<text x=\"1\" y=\"2\" textLength=\"16\" lengthAdjust=\"spacingAndGlyphs\" \
                    class=\"red\">&lt;&gt;</text>\n";
        assert!(text.contains(line), "{text}");
    }
}
