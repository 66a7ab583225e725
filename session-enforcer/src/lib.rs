//! The daemon's parts; see ARCHITECTURE.md for the map.
