//! The landing page at `/`. It shows no addresses and no user names. Pure.

/// The daemon's readiness.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Readiness {
    /// The daemon is ready.
    Ready,
    /// The daemon is not ready, for this reason.
    NotReady(String),
    /// The engine does not answer.
    Stuck,
}

impl Readiness {
    fn words(&self) -> String {
        match self {
            Self::Ready => {
                "ready: the programs are attached, and every connection that a rule matches \
                            is tracked, the older ones too"
                    .to_owned()
            }
            Self::NotReady(reason) => format!("not ready: {reason}"),
            Self::Stuck => "not ready: the engine does not answer".to_owned(),
        }
    }
}

/// The HTML of the page. It loads nothing.
pub(super) fn html(readiness: &Readiness) -> String {
    format!(
        r#"<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>session-enforcer</title>
<style>body {{ font-family: sans-serif; max-width: 40em; margin: 2em auto; padding: 0 1em }}</style>
<h1>session-enforcer</h1>
<p>Resets TCP connections that outlive their idle timeout or maximum lifetime.</p>
<p>Version {version}</p>
<p>The daemon is {readiness}.</p>
<ul>
<li><a href="metrics">metrics</a>: for Prometheus</li>
<li><a href="readyz">readyz</a>: 200 where it is ready, else 503 and why not</li>
<li><a href="healthz">healthz</a>: 200 where the engine is alive</li>
</ul>
</html>
"#,
        version = env!("CARGO_PKG_VERSION"),
        readiness = escaped(&readiness.words()),
    )
}

fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;");
    text.replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_says_version_and_readiness_and_leads_on() {
        let page = html(&Readiness::Ready);
        for words in [
            concat!("<p>Version ", env!("CARGO_PKG_VERSION"), "</p>"),
            "The daemon is ready: ",
            "href=\"metrics\"",
            "href=\"readyz\"",
            "href=\"healthz\"",
        ] {
            assert!(page.contains(words), "{words} in {page}");
        }
    }

    #[test]
    fn a_reason_is_text_and_never_markup() {
        let page = html(&Readiness::NotReady("a < b & <script>".to_owned()));
        let words = "The daemon is not ready: a &lt; b &amp; &lt;script&gt;.";
        assert!(page.contains(words), "{page}");
        assert!(html(&Readiness::Stuck).contains("the engine does not answer"));
    }
}
