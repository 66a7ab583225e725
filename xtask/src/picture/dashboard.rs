//! Draws the layout of the Grafana dashboard: its panels with titles, units and legends. It needs no Grafana and
//! draws no curves; the descriptions of the panels explain those.

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::svg::{Area, BACKGROUND, Svg};

/// The dashboard, from the root of the repository.
pub(super) const JSON: &str = "session-enforcer/monitoring/grafana-dashboard.json";

/// Sizes in pixels: a column and a row of Grafana's grid, which has 24 columns; the margin; a character.
const COLUMN: u32 = 42;
const ROW: u32 = 20;
const MARGIN: u32 = 12;
const CHARACTER: u32 = 8;

const PANEL: &str = "#1f2630";

#[derive(Deserialize)]
struct Dashboard {
    title: String,
    panels: Vec<Panel>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Panel {
    #[serde(rename = "type")]
    kind: String,
    title: String,
    grid_pos: GridPosition,
    #[serde(default)]
    field_config: FieldConfig,
    #[serde(default)]
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct GridPosition {
    x: u32,
    y: u32,
    w: u32,
    h: u32,
}

#[derive(Default, Deserialize)]
struct FieldConfig {
    #[serde(default)]
    defaults: Defaults,
}

#[derive(Default, Deserialize)]
struct Defaults {
    #[serde(default)]
    unit: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Target {
    #[serde(default)]
    legend_format: String,
}

/// Draws a dashboard.
pub(super) fn svg(json: &str) -> Result<String> {
    let dashboard: Dashboard =
        serde_json::from_str(json).with_context(|| format!("{JSON} is no dashboard"))?;
    let end = |panel: &Panel| panel.grid_pos.y + panel.grid_pos.h;
    let rows = dashboard.panels.iter().map(end).max();
    let rows = rows.with_context(|| format!("{JSON} has no panel"))?;
    let title = format!("The panels of the Grafana dashboard {}", dashboard.title);
    let mut svg = Svg::new(24 * COLUMN + 2 * MARGIN, rows * ROW + 2 * MARGIN, &title);
    for panel in &dashboard.panels {
        draw(&mut svg, panel);
    }
    Ok(svg.finish())
}

fn draw(svg: &mut Svg, panel: &Panel) {
    let GridPosition { x, y, w, h } = panel.grid_pos;
    let (x, y) = (MARGIN + x * COLUMN, MARGIN + y * ROW);
    if panel.kind == "row" {
        svg.text(x + 4, y + 15, None, "sans bold", &panel.title);
        return;
    }
    let is_plot = panel.kind == "timeseries";
    // A gap of some pixels separates two panels.
    let area = Area {
        x: x + 2,
        y: y + 2,
        width: w * COLUMN - 4,
        height: h * ROW - 4,
    };
    svg.rectangle(area, PANEL);
    let mut line = y + 20;
    for row in wrapped(&panel.title, (area.width - 16) / CHARACTER) {
        svg.text(x + 10, line, None, "sans bold", &row);
        line += 17;
    }
    let shows = if is_plot { "curves" } else { "value" };
    let unit = format!("{shows}{}", unit(&panel.field_config.defaults.unit));
    svg.text(x + 10, line, None, "sans dim", &unit);
    if !is_plot {
        return;
    }
    let plot = Area {
        x: area.x + 8,
        y: line + 8,
        width: area.width - 16,
        height: area.y + area.height - 24 - (line + 8),
    };
    svg.rectangle(plot, BACKGROUND);
    svg.text(
        x + 10,
        area.y + area.height - 8,
        None,
        "sans cyan",
        &legend(panel),
    );
}

/// Describes one of Grafana's units in words.
fn unit(name: &str) -> String {
    let words = match name {
        "" | "short" => return String::new(),
        "cps" => "per second",
        "percentunit" => "percent",
        "s" => "seconds",
        "dateTimeFromNow" => "time ago",
        other => other,
    };
    format!(", {words}")
}

/// The names of the curves. A label's value is replaced by the label's name.
fn legend(panel: &Panel) -> String {
    let names = panel
        .targets
        .iter()
        .map(|target| target.legend_format.as_str());
    let names: Vec<_> = names.filter(|name| !name.is_empty()).collect();
    names.join(", ").replace("{{", "‹").replace("}}", "›")
}

/// Splits a title into rows of at most this many characters.
fn wrapped(title: &str, characters: u32) -> Vec<String> {
    let mut rows: Vec<String> = Vec::new();
    for word in title.split(' ') {
        match rows.last_mut() {
            Some(row) if row.len() + 1 + word.len() <= characters as usize => {
                row.push(' ');
                row.push_str(word);
            }
            _ => rows.push(word.to_owned()),
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panel_has_its_place_title_unit_and_legend() {
        let json = r#"{"title": "d", "panels": [
            {"type": "row", "title": "Is it <well>", "gridPos": {"x": 0, "y": 0, "w": 24, "h": 1}},
            {"type": "timeseries", "title": "Opened", "gridPos": {"x": 12, "y": 1, "w": 12, "h": 8},
             "fieldConfig": {"defaults": {"unit": "cps"}},
             "targets": [{"legendFormat": "{{rule}}"}, {"legendFormat": "closed"}]}]}"#;
        let svg = svg(json).expect("a dashboard");
        for part in [
            "viewBox=\"0 0 1032 204\"",
            ">Is it &lt;well&gt;</text>",
            "<rect x=\"518.5\" y=\"34.5\" width=\"500\" height=\"156\"",
            ">Opened</text>",
            ">curves, per second</text>",
            ">‹rule›, closed</text>",
        ] {
            assert!(svg.contains(part), "{part} in {svg}");
        }
    }

    #[test]
    fn a_title_is_wrapped_between_words() {
        assert_eq!(
            wrapped("Configuration in force since", 16),
            ["Configuration in", "force since"]
        );
    }

    #[test]
    fn the_picture_in_the_documentation_is_that_of_the_dashboard() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../");
        let read = |path: &str| std::fs::read_to_string(format!("{root}{path}")).expect(path);
        let stands = read(&format!("{}/dashboard.svg", super::super::FOLDER));
        let made = svg(&read(JSON)).expect("a dashboard");
        assert!(
            stands == made,
            "out of date; remedy: `cargo xtask picture dashboard`"
        );
    }
}
